"""Other languages and other ways to link: Rust through `extern "C"`, and objects of two models in one program."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

import duo
from duo import nn
from duo.cli import main
from tests.aot.models import mlp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")

RUST = r"""
use std::ffi::{c_char, c_int, c_void, CStr};
use std::io::Write;

#[repr(C)]
struct Options {
    threads: i64,
    allocate: Option<extern "C" fn(usize, usize, *mut c_void) -> *mut c_void>,
    release: Option<extern "C" fn(*mut c_void, *mut c_void)>,
    user: *mut c_void,
    weights: *const c_void,
}

#[repr(C)]
struct Mlp { _private: [u8; 0] }

#[link(name = "mlp")]
extern "C" {
    fn mlp_create(options: *const Options, model: *mut *mut Mlp) -> c_int;
    fn mlp_destroy(model: *mut Mlp);
    fn mlp_message(model: *const Mlp) -> *const c_char;
    fn mlp_forward(model: *mut Mlp, batch: i64, x: *const f32, output: *mut f32) -> c_int;
    fn mlp_forward_scratch_bytes(model: *mut Mlp, batch: i64) -> i64;
}

struct Model(*mut Mlp);

impl Model {
    fn new(threads: i64) -> Result<Model, c_int> {
        let options = Options {
            threads, allocate: None, release: None, user: std::ptr::null_mut(), weights: std::ptr::null(),
        };
        let mut model = std::ptr::null_mut();
        match unsafe { mlp_create(&options, &mut model) } { 0 => Ok(Model(model)), code => Err(code) }
    }

    fn forward(&mut self, batch: i64, x: &[f32], y: &mut [f32]) -> Result<(), (c_int, String)> {
        match unsafe { mlp_forward(self.0, batch, x.as_ptr(), y.as_mut_ptr()) } {
            0 => Ok(()),
            code => Err((code, unsafe { CStr::from_ptr(mlp_message(self.0)) }.to_str().unwrap().to_owned())),
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) { unsafe { mlp_destroy(self.0) } }
}

unsafe impl Send for Model {}

fn run(threads: i64) -> Vec<u8> {
    let mut model = Model::new(threads).unwrap();
    let mut bytes = Vec::new();
    for batch in 1..10usize {
        let x: Vec<f32> = (0..batch * 20).map(|k| ((k * 37 + batch) % 101) as f32 / 50.0 - 1.0).collect();
        let mut y = vec![0f32; batch * 10];
        model.forward(batch as i64, &x, &mut y).unwrap();
        for v in y { bytes.extend(v.to_le_bytes()); }
    }
    bytes
}

fn main() {
    assert_eq!(Model::new(-1).err(), Some(7));
    let mut model = Model::new(1).unwrap();
    let (code, said) = model.forward(-1, &[], &mut []).unwrap_err();
    assert_eq!((code, said.as_str()), (2, "batch is -1; a size must not be negative"));
    assert_eq!(unsafe { mlp_forward(model.0, 3, std::ptr::null(), std::ptr::null_mut()) }, 1);
    assert_eq!(unsafe { CStr::from_ptr(mlp_message(model.0)) }.to_str().unwrap(), "x is NULL");
    assert_eq!(unsafe { mlp_forward_scratch_bytes(model.0, -9) }, -2);
    let others: Vec<_> = (1..3).map(|threads| std::thread::spawn(move || run(threads))).collect();
    for other in others {
        std::io::stdout().write_all(&other.join().unwrap()).unwrap();
    }
}
"""


@pytest.mark.skipif(shutil.which("rustc") is None, reason="needs rustc")
def test_rust(tmp_path):
    """Codes, messages, and the bits of Python for batches of 1 to 9 from two threads of a Rust program."""
    model = mlp()
    duo.export(model, "x: f32[batch,20]", path=tmp_path / "libmlp.so")
    (tmp_path / "main.rs").write_text(RUST)
    flags = ["--edition", "2021", "-D", "warnings", "-L", str(tmp_path), "-C", f"link-arg=-Wl,-rpath,{tmp_path}"]
    done = subprocess.run(
        ["rustc", *flags, str(tmp_path / "main.rs"), "-o", str(tmp_path / "main")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    want = []
    for b in range(1, 10):
        x = (((np.arange(b * 20) * 37 + b) % 101).astype("f4") / np.float32(50) - np.float32(1)).reshape(b, 20)
        want.append(model(duo.tensor(x)).detach().numpy().tobytes())
    assert done.stdout == b"".join(want) * 2


MODELS = """
import duo
from duo import nn

class One(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 70), nn.GELU(), nn.Linear(70, 3), nn.Softmax(-1))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 5, 3), nn.BatchNorm1d(5), nn.Linear(30, 4)

    def forward(self, x):
        return self.head(nn.functional.relu(self.norm(self.conv(x))).flatten(1))
"""
TWO = r"""
#include <stdio.h>
#include <stdlib.h>
#include "one.h"
#include "three.h"
#include "two.h"

static void *content(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) exit(10);
    void *memory = aligned_alloc(64, 1 << 20);
    if (!fread(memory, 1, 1 << 20, file)) exit(11);
    fclose(file);
    return memory;
}

int main(void) {
    one_options o = {.threads = 2, .weights = content("one.weights")};
    two_options p = {.threads = 1, .weights = content("two.weights")};
    three_options q = {.weights = content("three.weights")};
    one *a;
    two *b;
    three *c;
    float x[40 * 8], loss;
    static float y[40 * 4];
    int64_t target[40];
    for (int k = 0; k < 40 * 8; k++) x[k] = (float)(k * 37 % 101) / 50 - 1;
    for (int k = 0; k < 40; k++) target[k] = k % 3;
    if (one_create(&o, &a) || two_create(&p, &b) || three_create(&q, &c)) return 1;
    if (one_forward(a, 40, x, y)) return 2;
    fwrite(y, 4, 40 * 3, stdout);
    if (two_forward(b, 40, x, y)) return 3;
    fwrite(y, 4, 40 * 4, stdout);
    for (int k = 0; k < 3; k++) {
        if (three_train_step(c, 40, x, target, &loss)) return 4;
        fwrite(&loss, 4, 1, stdout);
    }
    one_destroy(a);
    two_destroy(b);
    three_destroy(c);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_objects_of_three_models_in_one_program(tmp_path, monkeypatch):
    """`--emit obj`: two that infer and one that trains, linked together, also without any shared library."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODELS)
    emit = ["--emit", "obj"]
    assert main(["compile", "model.py:One", "--input", "x: f32[batch,8]", *emit]) == 0
    assert main(["compile", "model.py:Two", "--input", "x: f32[batch,1,8]", *emit]) == 0
    train = ["--train", "cross_entropy", "--optimizer", "adam", "--lr", "0.1", "--name", "three"]
    assert main(["compile", "model.py:One", "--input", "x: f32[batch,8]", "--input", "y: i64[batch]", *train, *emit]) == 0
    (tmp_path / "main.c").write_text(TWO)
    space: dict = {}
    exec(MODELS, space)
    x = ((np.arange(320) * 37 % 101).astype("f4") / np.float32(50) - np.float32(1)).reshape(40, 8)
    duo.manual_seed(0)
    want = space["One"]()(duo.tensor(x)).detach().numpy().tobytes()
    duo.manual_seed(0)
    want += space["Two"]().eval()(duo.tensor(x[:, None])).detach().numpy().tobytes()
    duo.manual_seed(0)
    model = space["One"]()
    optimizer = duo.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(duo.tensor(x)), duo.tensor(np.arange(40) % 3))
        loss.backward()
        optimizer.step()
        want += loss.detach().numpy().tobytes()
    for how in ([], ["-static"]):
        command = ["gcc", "-std=c11", "-Wall", "-Werror", *how, "main.c", "two.o", "three.o", "one.o", "-lpthread", "-o", "main"]
        subprocess.run(command, check=True)
        assert subprocess.run(["./main"], capture_output=True, check=True).stdout == want, how
