"""LLVM text that works on Python objects: the functions of the interpreter it may call, the slots and objects that the frontend names, and
a few words that stand for several lines of LLVM's (`expanded`).

`%x = get OWNER.SLOT %object`, `%x = const NAME` (an object of the frontend's), `set OWNER.SLOT %object %value` (of a new object; takes a
reference), `give OWNER.SLOT %object %value` (hands one over), `swap OWNER.SLOT %object %value` (a new reference for the old one),
`drop %a %b` (gives references back, of those that are not null) and `%x = missing %a %b` (whether any is null).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Functions of Python's C interface, and their types.
SIGNATURES = {
    "PyDict_Clear": "void (ptr)",
    "PyDict_GetItem": "ptr (ptr, ptr)",
    "PyDict_New": "ptr ()",
    "PyDict_Next": "i32 (ptr, ptr, ptr, ptr)",
    "PyDict_SetItem": "i32 (ptr, ptr, ptr)",
    "PyErr_Clear": "void ()",
    "PyErr_Occurred": "ptr ()",
    "PyEval_GetFrame": "ptr ()",
    "PyFrame_GetBack": "ptr (ptr)",
    "PyFrame_GetCode": "ptr (ptr)",
    "PyFrame_GetLasti": "i32 (ptr)",
    "PyList_Append": "i32 (ptr, ptr)",
    "PyList_GetItem": "ptr (ptr, i64)",
    "PyList_New": "ptr (i64)",
    "PyList_SetItem": "i32 (ptr, i64, ptr)",
    "PyList_SetSlice": "i32 (ptr, i64, i64, ptr)",
    "PyList_Size": "i64 (ptr)",
    "PyLong_AsLongLong": "i64 (ptr)",
    "PyLong_FromLongLong": "ptr (i64)",
    "PyObject_GetAttr": "ptr (ptr, ptr)",
    "PyObject_RichCompareBool": "i32 (ptr, ptr, i32)",
    "PyObject_Vectorcall": "ptr (ptr, ptr, i64, ptr)",
    "PyObject_VectorcallMethod": "ptr (ptr, ptr, i64, ptr)",
    "PyThreadState_Get": "ptr ()",
    "PyThreadState_GetID": "i64 (ptr)",
    "PyTuple_GetItem": "ptr (ptr, i64)",
    "PyTuple_New": "ptr (i64)",
    "PyTuple_SetItem": "i32 (ptr, i64, ptr)",
    "PyTuple_Size": "i64 (ptr)",
    "PyType_GenericAlloc": "ptr (ptr, i64)",
    "PyType_IsSubtype": "i32 (ptr, ptr)",
    "PyWeakref_NewRef": "ptr (ptr, ptr)",
    "Py_DecRef": "void (ptr)",
    "Py_IncRef": "void (ptr)",
}

_BASICS = """
@duo.objects = internal global [COUNT x ptr] zeroinitializer, align 64
define void @duo_recorder_objects(ptr %objects) nounwind {
entry:
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k2, %one ]
  %more = icmp ult i64 %k, COUNT
  br i1 %more, label %one, label %end
one:
  %from = getelementptr ptr, ptr %objects, i64 %k
  %object = load ptr, ptr %from
  %to = getelementptr ptr, ptr @duo.objects, i64 %k
  store ptr %object, ptr %to
  %k2 = add i64 %k, 1
  br label %next
end:
  ret void
}
define internal ptr @duo.class(ptr %object) alwaysinline nounwind {
  %at = getelementptr ptr, ptr %object, i64 1
  %class = load ptr, ptr %at
  ret ptr %class
}
define internal void @duo.drop(ptr %object) nounwind {
entry:
  %nothing = icmp eq ptr %object, null
  br i1 %nothing, label %end, label %drop
drop:
  call void @Py_DecRef(ptr %object)
  br label %end
end:
  ret void
}
; Whether only one reference to the object exists.
define internal i1 @duo.alone(ptr %object) alwaysinline nounwind {
  %count = load i32, ptr %object
  %one = icmp eq i32 %count, 1
  ret i1 %one
}
; What native code made, or if it made nothing and there is no error, what Python's function gives.
define internal ptr @duo.or.python(ptr %made, ptr %function, ptr %args, i64 %nargs) nounwind {
entry:
  %nothing = icmp eq ptr %made, null
  br i1 %nothing, label %refused, label %done
refused:
  %error = call ptr @PyErr_Occurred()
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %done, label %python
python:
  %result = call ptr @PyObject_Vectorcall(ptr %function, ptr %args, i64 %nargs, ptr null)
  ret ptr %result
done:
  ret ptr %made
}
"""


def basics(count: int) -> str:
    """Declarations, and what every text needs, for that many objects of the frontend's, which `duo_recorder_objects` takes."""
    declared = "".join(f"declare {found.replace(' (', f' @{name}(', 1)}\n" for name, found in SIGNATURES.items())
    return declared + _BASICS.replace("COUNT", str(count))


_CONST = re.compile(r"\s+(%[\w.]+) = const ([\w.]+)$")
_GET = re.compile(r"\s+(%[\w.]+) = get ([\w.]+) (%[\w.]+)$")
_SET = re.compile(r"\s+(set|give|swap) ([\w.]+) (%[\w.]+) (%[\w.]+)$")
_DROP = re.compile(r"\s+drop ((?:%[\w.]+ ?)+)$")
_MISSING = re.compile(r"\s+(%[\w.]+) = missing ((?:%[\w.]+ ?)+)$")


def expanded(text: str, offsets: Mapping[str, int], names: Sequence[str]) -> str:
    """The text in LLVM's own words, for these offsets of slots in bytes and the names of the objects in order."""
    places = {name: k for k, name in enumerate(names)}
    return "\n".join(_line(number, line, offsets, places) for number, line in enumerate(text.split("\n")))


def _line(number: int, line: str, offsets: Mapping[str, int], places: Mapping[str, int]) -> str:
    """The line, or what it is short for."""
    found = _CONST.match(line)
    if found is not None:
        name, what = found.groups()
        return f"  {name} = load ptr, ptr getelementptr (ptr, ptr @duo.objects, i64 {places[what]})"
    found = _GET.match(line)
    if found is not None:
        name, slot, owner = found.groups()
        at = f"  %at.{number} = getelementptr i8, ptr {owner}, i64 {offsets[slot]}\n"
        return f"{at}  {name} = load ptr, ptr %at.{number}"
    found = _DROP.match(line)
    if found is not None:
        return "\n".join(f"  call void @duo.drop(ptr {name})" for name in found.group(1).split())
    found = _MISSING.match(line)
    if found is not None:
        return _missing(number, found.group(1), found.group(2).split())
    found = _SET.match(line)
    if found is not None:
        how, slot, owner, value = found.groups()
        at = f"  %at.{number} = getelementptr i8, ptr {owner}, i64 {offsets[slot]}\n"
        store = f"{at}  store ptr {value}, ptr %at.{number}"
        if how == "give":
            return store
        counted = f"  call void @Py_IncRef(ptr {value})\n{store}"
        if how == "set":
            return counted
        old = f"  %old.{number} = load ptr, ptr %at.{number}\n  store ptr"
        return counted.replace("  store ptr", old) + f"\n  call void @Py_DecRef(ptr %old.{number})"
    return line


def _missing(number: int, name: str, objects: Sequence[str]) -> str:
    lines, before = [], "false"
    for k, each in enumerate(objects):
        after = name if k == len(objects) - 1 else f"%any.{number}.{k}"
        lines += [f"  %null.{number}.{k} = icmp eq ptr {each}, null", f"  {after} = or i1 {before}, %null.{number}.{k}"]
        before = after
    return "\n".join(lines)
