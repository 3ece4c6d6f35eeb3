// A libcuda.so.1 that runs on the CPU, enough of it for PyCUDA and for duo's driver. "Cubins" are shared objects made by build.py.
// What a stream is given runs when somebody waits for it, in order, and not before: whoever reads too early, or reuses memory that is
// still to be read, sees it. DUO_EMU_SYNC=1 runs everything at once. Memory is poisoned and lies between guard pages, so that a kernel's
// access outside an allocation is an error; so is one after it was freed. Errors are reported once, by the call that waits.
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "schedule.h"

typedef int Result;
typedef unsigned long long Address;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
       LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900 };
#define API extern "C" __attribute__((visibility("default"))) Result

static std::recursive_mutex mutex;
static std::string last_error;
#define LOCKED std::lock_guard<std::recursive_mutex> guard(mutex)
#define IN_CONTEXT LOCKED; if (contexts.empty()) return error(INVALID_CONTEXT, "no context is current on this thread")
#define NOT_CAPTURING if (capturing) return error(CAPTURE_UNSUPPORTED, "a synchronous call while this thread captures a stream")

static Result error(Result code, const std::string &message) {
  last_error = message;
  if (getenv("DUO_EMU_VERBOSE")) fprintf(stderr, "cuda emulator: %s\n", message.c_str());
  return code;
}
static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

// ------------------------------------------------------------------------------------------------------------------ device
static bool initialised;
API cuInit(unsigned) { LOCKED; initialised = true; return setting("DUO_EMU_GPUS", 1) ? OK : error(NO_DEVICE, "no CUDA-capable device is detected"); }
API cuDriverGetVersion(int *v) { *v = 13000; return OK; }
API cuDeviceGetCount(int *n) { if (!initialised) return NOT_INITIALIZED; *n = (int)setting("DUO_EMU_GPUS", 1); return OK; }
API cuDeviceGet(int *device, int n) { if (!initialised) return NOT_INITIALIZED; if (n < 0 || n >= setting("DUO_EMU_GPUS", 1)) return error(INVALID_DEVICE, "invalid device ordinal"); *device = n; return OK; }
API cuDeviceGetName(char *text, int n, int) { snprintf(text, (size_t)n, "CPU emulating a GPU (sm_90)"); return OK; }
API cuDeviceGetPCIBusId(char *text, int n, int device) { snprintf(text, (size_t)n, "0000:00:%02d.0", device); return OK; }
static size_t total_memory() { return (size_t)setting("DUO_EMU_MEMORY_MB", 4096) << 20; }
API cuDeviceTotalMem_v2(size_t *n, int) { *n = total_memory(); return OK; }
API cuDeviceComputeCapability(int *major, int *minor, int) { *major = 9, *minor = 0; return OK; }
API cuDeviceCanAccessPeer(int *can, int, int) { *can = 0; return OK; }
API cuDeviceGetAttribute(int *value, int attribute, int) {
  static const std::map<int, int> known = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535},
      {8, 49152}, {10, 32}, {12, 65536}, {13, 1980000}, {16, 132}, {19, 1}, {31, 1}, {38, 50 << 20}, {39, 2048}, {41, 1}, {75, 9}, {76, 0},
      {81, 233472}, {82, 65536}, {83, 1}, {97, 232448}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return OK;
}

// ---------------------------------------------------------------------------------------------------------------- contexts
struct Context { int references; };
static Context primary;
static thread_local std::vector<Context *> contexts;
static thread_local int capturing;
API cuDevicePrimaryCtxRetain(Context **c, int) { LOCKED; primary.references++; *c = &primary; return OK; }
API cuDevicePrimaryCtxRelease_v2(int) { LOCKED; primary.references--; return OK; }
API cuCtxCreate_v4(Context **c, void *, unsigned, int) { LOCKED; *c = new Context{1}; contexts.push_back(*c); return OK; }
API cuCtxPushCurrent_v2(Context *c) { contexts.push_back(c); return OK; }
API cuCtxPopCurrent_v2(Context **c) { if (contexts.empty()) return INVALID_CONTEXT; if (c) *c = contexts.back(); contexts.pop_back(); return OK; }
API cuCtxGetCurrent(Context **c) { *c = contexts.empty() ? nullptr : contexts.back(); return OK; }
API cuCtxSetCurrent(Context *c) { if (!contexts.empty()) contexts.pop_back(); if (c) contexts.push_back(c); return OK; }
API cuCtxAttach(Context **c, unsigned) { if (contexts.empty()) return INVALID_CONTEXT; *c = contexts.back(); return OK; }
API cuCtxDetach(Context *) { return OK; }
API cuCtxGetDevice(int *device) { if (contexts.empty()) return INVALID_CONTEXT; *device = 0; return OK; }
API cuCtxGetApiVersion(Context *, unsigned *v) { *v = 3020; return OK; }

// ------------------------------------------------------------------------------------------------------------------ memory
struct Allocation { size_t nbytes; char *map; size_t mapped; bool host, freed; };
static std::map<uintptr_t, Allocation> allocations;  // by address; freed ones stay a while, without access
static std::deque<uintptr_t> graveyard;
static size_t in_use;

static Allocation *containing(uintptr_t p, size_t n) {
  auto after = allocations.upper_bound(p);
  if (after == allocations.begin()) return nullptr;
  --after;
  Allocation &a = after->second;
  return !a.freed && p + n <= after->first + a.nbytes ? &a : nullptr;
}
static std::string describe_address(uintptr_t p) {
  for (auto &[start, a] : allocations) {
    uintptr_t from = (uintptr_t)a.map, to = from + a.mapped;
    if (p < from || p >= to) continue;
    std::string what = "an allocation of " + std::to_string(a.nbytes) + " bytes";
    if (a.freed) return "inside " + what + " that was freed";
    if (p < start) return std::to_string(start - p) + " bytes before the start of " + what;
    return std::to_string(p - start - a.nbytes) + " bytes past the end of " + what;
  }
  return "to an address that is in no allocation";
}
static const size_t FRONT = 64;  // bytes of pattern before a block; those up to 15 after its end hold it as well
static Result new_memory(void **out, size_t n, bool host) {
  if (!n) return error(INVALID_VALUE, "an allocation of 0 bytes");
  if (!host && in_use + n > total_memory()) return error(OUT_OF_MEMORY, "out of memory");
  const size_t room = (n + 15) / 16 * 16, pages = (room + FRONT + PAGE - 1) / PAGE * PAGE;
  char *map = (char *)mmap(nullptr, pages + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map + GUARD, pages, PROT_READ | PROT_WRITE)) return error(OUT_OF_MEMORY, "out of memory");
  char *start = map + GUARD + pages - room;
  memset(start - FRONT, 0xa5, FRONT);
  memset(start, 0xff, n);
  memset(start + n, 0xa5, room - n);
  allocations[(uintptr_t)start] = {n, map, pages + 2 * GUARD, host, false};
  if (!host) in_use += n;
  *out = start;
  return OK;
}
static std::string damage(uintptr_t start, const Allocation &a) {
  const unsigned char *p = (const unsigned char *)start;
  for (size_t i = 1; i <= FRONT; i++)
    if (p[-(long)i] != 0xa5) return "a write " + std::to_string(i) + " bytes before an allocation of " + std::to_string(a.nbytes) + " bytes";
  for (size_t i = a.nbytes; i < (a.nbytes + 15) / 16 * 16; i++)
    if (p[i] != 0xa5) return "a write past the end of an allocation of " + std::to_string(a.nbytes) + " bytes";
  return "";
}
static Result run_everything();
static Result free_memory(uintptr_t p, bool host) {
  auto found = allocations.find(p);
  if (found == allocations.end() || found->second.freed || found->second.host != host) return error(INVALID_VALUE, "a free of memory that is not allocated");
  Result code = run_everything();
  Allocation &a = found->second;
  a.freed = true;
  if (!host) in_use -= a.nbytes;
  mprotect(a.map, a.mapped, PROT_NONE);
  graveyard.push_back(p);
  if (graveyard.size() > 256) {
    Allocation &old = allocations[graveyard.front()];
    munmap(old.map, old.mapped);
    allocations.erase(graveyard.front());
    graveyard.pop_front();
  }
  return code;
}
API cuMemAlloc_v2(Address *p, size_t n) { IN_CONTEXT; NOT_CAPTURING; return new_memory((void **)p, n, false); }
API cuMemFree_v2(Address p) { IN_CONTEXT; NOT_CAPTURING; return free_memory((uintptr_t)p, false); }
API cuMemHostAlloc(void **p, size_t n, unsigned) { IN_CONTEXT; NOT_CAPTURING; return new_memory(p, n, true); }
API cuMemFreeHost(void *p) { IN_CONTEXT; NOT_CAPTURING; return free_memory((uintptr_t)p, true); }
API cuMemHostGetDevicePointer_v2(Address *d, void *p, unsigned) { *d = (Address)p; return OK; }
API cuMemHostGetFlags(unsigned *flags, void *) { *flags = 0; return OK; }
API cuMemGetInfo_v2(size_t *free, size_t *total) { IN_CONTEXT; *total = total_memory(), *free = *total - in_use; return OK; }

// ----------------------------------------------------------------------------------------------------- streams, copies, graphs
typedef std::function<Result()> Work;
struct Graph { std::vector<Work> nodes; };
struct Stream { std::deque<Work> queue; Graph *capture = nullptr; };
static std::vector<Stream *> streams;

static Result drain(Stream *s, size_t count = SIZE_MAX) {
  for (; count && !s->queue.empty(); count--) {
    Work work = std::move(s->queue.front());
    s->queue.pop_front();
    if (Result code = work()) {
      s->queue.clear();
      return code;
    }
  }
  return OK;
}
static Result run_everything() {
  Result first = OK;
  for (Stream *s : std::vector<Stream *>(streams)) {
    Result code = drain(s);
    if (!first) first = code;
  }
  return first;
}
static bool named(Stream *s) { return (uintptr_t)s > 4096; }  // 0, 1, 2: the default streams
static Result submit(Stream *s, Work work) {
  if (!named(s)) {
    if (Result code = run_everything()) return code;
    return work();
  }
  if (s->capture) {
    s->capture->nodes.push_back(std::move(work));
    return OK;
  }
  s->queue.push_back(std::move(work));
  return setting("DUO_EMU_SYNC", 0) ? drain(s) : OK;
}
API cuStreamCreate(Stream **s, unsigned) { IN_CONTEXT; streams.push_back(*s = new Stream); return OK; }
API cuStreamDestroy_v2(Stream *s) {
  LOCKED;
  Result code = drain(s);
  for (size_t i = 0; i < streams.size(); i++) if (streams[i] == s) { streams.erase(streams.begin() + (long)i); break; }
  delete s;
  return code;
}
API cuStreamQuery(Stream *s) { IN_CONTEXT; if (!named(s) || s->queue.empty()) return OK; Result code = drain(s, 1); return code ? code : NOT_READY; }
API cuStreamSynchronize(Stream *s) { IN_CONTEXT; NOT_CAPTURING; return named(s) ? drain(s) : run_everything(); }
API cuCtxSynchronize(void) { IN_CONTEXT; NOT_CAPTURING; return run_everything(); }

static Result copy(char *to, const char *from, size_t n, bool to_device, bool from_device) {
  if (n && to_device && !containing((uintptr_t)to, n)) return error(INVALID_VALUE, "a copy to memory outside of any allocation");
  if (n && from_device && !containing((uintptr_t)from, n)) return error(INVALID_VALUE, "a copy from memory outside of any allocation");
  memmove(to, from, n);
  return OK;
}
static bool pinned(const void *p) { Allocation *a = containing((uintptr_t)p, 1); return a && a->host; }
API cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t n, Stream *s) {
  IN_CONTEXT;
  if (pinned(from)) return submit(s, [=] { return copy((char *)to, (const char *)from, n, true, true); });
  if (named(s) && s->capture) return error(CAPTURE_UNSUPPORTED, "a copy from pageable memory while capturing");
  std::string bytes((const char *)from, n);
  return submit(s, [=] { return copy((char *)to, bytes.data(), n, true, false); });
}
API cuMemcpyDtoHAsync_v2(void *to, Address from, size_t n, Stream *s) {
  IN_CONTEXT;
  Work work = [=] { return copy((char *)to, (const char *)from, n, pinned(to), true); };
  if (pinned(to)) return submit(s, work);
  if (named(s) && s->capture) return error(CAPTURE_UNSUPPORTED, "a copy to pageable memory while capturing");
  Result code = submit(s, work);
  return code ? code : named(s) ? drain(s) : OK;
}
API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t n, Stream *s) {
  IN_CONTEXT;
  return submit(s, [=] { return copy((char *)to, (const char *)from, n, true, true); });
}
API cuMemcpyHtoD_v2(Address to, const void *from, size_t n) { IN_CONTEXT; NOT_CAPTURING; return submit(nullptr, [=] { return copy((char *)to, (const char *)from, n, true, false); }); }
API cuMemcpyDtoH_v2(void *to, Address from, size_t n) { IN_CONTEXT; NOT_CAPTURING; return submit(nullptr, [=] { return copy((char *)to, (const char *)from, n, false, true); }); }
API cuMemcpyDtoD_v2(Address to, Address from, size_t n) { IN_CONTEXT; NOT_CAPTURING; return submit(nullptr, [=] { return copy((char *)to, (const char *)from, n, true, true); }); }
static Result fill(Address to, unsigned value, size_t size, size_t n) {
  if (n && !containing((uintptr_t)to, n * size)) return error(INVALID_VALUE, "a fill of memory outside of any allocation");
  for (size_t i = 0; i < n; i++) memcpy((char *)to + i * size, &value, size);
  return OK;
}
API cuMemsetD8Async(Address to, unsigned char v, size_t n, Stream *s) { IN_CONTEXT; return submit(s, [=] { return fill(to, v, 1, n); }); }
API cuMemsetD32Async(Address to, unsigned v, size_t n, Stream *s) { IN_CONTEXT; return submit(s, [=] { return fill(to, v, 4, n); }); }
API cuMemsetD8_v2(Address to, unsigned char v, size_t n) { IN_CONTEXT; return submit(nullptr, [=] { return fill(to, v, 1, n); }); }
API cuMemsetD32_v2(Address to, unsigned v, size_t n) { IN_CONTEXT; return submit(nullptr, [=] { return fill(to, v, 4, n); }); }

// An event stands for its latest record; who waits for an earlier one goes on waiting for that.
struct Record { Stream *stream; bool done; double milliseconds; };
typedef std::shared_ptr<Record> Recorded;
struct Event { Recorded latest; };
static double now() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6; }
static Result reach(const Recorded &r) {
  while (r && !r->done) {
    if (!named(r->stream) || r->stream->queue.empty()) return OK;
    if (Result code = drain(r->stream, 1)) return code;
  }
  return OK;
}
API cuEventCreate(Event **e, unsigned) { IN_CONTEXT; *e = new Event; return OK; }
API cuEventDestroy_v2(Event *e) { LOCKED; delete e; return OK; }
API cuEventRecord(Event *e, Stream *s) {
  IN_CONTEXT;
  NOT_CAPTURING;
  Recorded r = e->latest = std::make_shared<Record>(Record{s, false, 0});
  return submit(s, [=] { r->done = true, r->milliseconds = now(); return OK; });
}
API cuEventQuery(Event *e) {
  IN_CONTEXT;
  if (!e->latest || e->latest->done) return OK;
  Result code = named(e->latest->stream) ? drain(e->latest->stream, 1) : OK;
  return code ? code : NOT_READY;
}
API cuEventSynchronize(Event *e) { IN_CONTEXT; NOT_CAPTURING; return reach(e->latest); }
API cuStreamWaitEvent(Stream *s, Event *e, unsigned) { IN_CONTEXT; Recorded r = e->latest; return submit(s, [=] { return reach(r); }); }
API cuEventElapsedTime_v2(float *ms, Event *a, Event *b) {
  LOCKED;
  if (!a->latest || !b->latest) return error(INVALID_HANDLE, "an event that was never recorded");
  if (!a->latest->done || !b->latest->done) return error(NOT_READY, "an event that is not ready");
  *ms = (float)(b->latest->milliseconds - a->latest->milliseconds);
  return OK;
}
API cuEventElapsedTime(float *ms, Event *a, Event *b) { return cuEventElapsedTime_v2(ms, a, b); }

API cuStreamBeginCapture_v2(Stream *s, int) {
  IN_CONTEXT;
  if (!named(s) || s->capture) return error(ILLEGAL_STATE, "this stream cannot be captured");
  s->capture = new Graph;
  capturing++;
  return OK;
}
API cuStreamEndCapture(Stream *s, Graph **g) {
  IN_CONTEXT;
  if (!s->capture) return error(ILLEGAL_STATE, "this stream is not being captured");
  *g = s->capture;
  s->capture = nullptr;
  capturing--;
  return OK;
}
API cuGraphGetNodes(Graph *g, void **, size_t *n) { *n = g->nodes.size(); return OK; }
API cuGraphInstantiateWithFlags(Graph **exec, Graph *g, unsigned long long) { LOCKED; *exec = new Graph(*g); return OK; }
API cuGraphDestroy(Graph *g) { LOCKED; delete g; return OK; }
API cuGraphExecDestroy(Graph *g) { LOCKED; delete g; return OK; }
API cuGraphLaunch(Graph *exec, Stream *s) {
  IN_CONTEXT;
  std::vector<Work> nodes = exec->nodes;
  return submit(s, [=] {
    for (const Work &node : nodes) if (Result code = node()) return code;
    return (Result)OK;
  });
}

// ----------------------------------------------------------------------------------------------------------------- modules
struct Module { void *handle; int file; };
struct Function { const EmuKernel *kernel; std::string name; int shared; };
API cuModuleLoadData(Module **m, const void *image) {
  IN_CONTEXT;
  const unsigned char *bytes = (const unsigned char *)image;
  if (memcmp(bytes, "\177ELF", 4)) return error(INVALID_IMAGE, "not an ELF file: compile with the emulator's nvcc");
  if (bytes[18] == 190) return error(INVALID_IMAGE, "a real cubin: the emulator runs what its own nvcc makes");
  uint64_t sections;
  uint16_t size, count;
  memcpy(&sections, bytes + 40, 8), memcpy(&size, bytes + 58, 2), memcpy(&count, bytes + 60, 2);
  const size_t n = sections + (size_t)size * count;
  int file = memfd_create("module", 0);
  if (write(file, image, n) != (ssize_t)n) return OUT_OF_MEMORY;
  std::string path = "/proc/self/fd/" + std::to_string(file);
  void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  EmuBlock **block = handle ? (EmuBlock **)dlsym(handle, "emu_block") : nullptr;
  if (!block) { close(file); return error(INVALID_IMAGE, handle ? "a shared object that is no module" : dlerror()); }
  *block = &run.block;
  *m = new Module{handle, file};
  return OK;
}
API cuModuleLoadDataEx(Module **m, const void *image, unsigned, int *, void **) { return cuModuleLoadData(m, image); }
API cuModuleUnload(Module *m) { LOCKED; Result code = run_everything(); dlclose(m->handle); close(m->file); delete m; return code; }
API cuModuleGetFunction(Function **f, Module *m, const char *name) {
  IN_CONTEXT;
  const EmuKernel *kernel = (const EmuKernel *)dlsym(m->handle, (std::string("emu_kernel_") + name).c_str());
  if (!kernel) return error(NOT_FOUND, std::string("the module has no kernel ") + name);
  *f = new Function{kernel, name, 48 << 10};
  return OK;
}
API cuFuncGetAttribute(int *v, int attribute, Function *f) { *v = attribute == 0 ? 1024 : attribute == 4 ? 32 : attribute == 8 ? f->shared : 0; return OK; }
API cuFuncSetAttribute(Function *f, int attribute, int v) {
  if (attribute != 8) return OK;
  if (v > (int)MAX_SHARED) return error(INVALID_VALUE, "more dynamic shared memory than a block can have");
  f->shared = v;
  return OK;
}
API cuFuncSetCacheConfig(Function *, int) { return OK; }
API cuFuncSetBlockShape(Function *, int, int, int) { return OK; }  // older PyCUDA calls these two before every launch
API cuFuncSetSharedSize(Function *, unsigned) { return OK; }
API cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream *s,
                   void **parameters, void **extra) {
  IN_CONTEXT;
  if (!gx || !gy || !gz || gx > 2147483647u || gy > 65535 || gz > 65535) return error(INVALID_VALUE, f->name + ": invalid grid");
  if (!bx || !by || !bz || bz > 64 || bx * by * bz > MAX_THREADS) return error(INVALID_VALUE, f->name + ": invalid block");
  if ((int)shared > f->shared) return error(INVALID_VALUE, f->name + ": more dynamic shared memory than was set for it");
  std::string arguments;
  if (parameters) {
    for (int i = 0; i < f->kernel->parameters; i++) arguments.append((const char *)parameters[i], 8);
  } else if (extra) {  // pairs that end with 0: 1 is the buffer, 2 the address of its size
    const char *buffer = nullptr;
    size_t n = 0;
    for (void **e = extra; *e; e += 2) {
      if ((uintptr_t)*e == 1) buffer = (const char *)e[1];
      if ((uintptr_t)*e == 2) n = *(size_t *)e[1];
    }
    arguments.assign(buffer, n);
  }
  if (arguments.size() != 8 * (size_t)f->kernel->parameters) return error(INVALID_VALUE, f->name + ": wrong number of arguments");
  return submit(s, [=] {
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    std::string wrong = launch(f->kernel, grid, block, shared, arguments.data());
    if (wrong.empty())
      for (auto &[start, a] : allocations)
        if (!a.freed && !(wrong = damage(start, a)).empty()) {
          memset((char *)start - FRONT, 0xa5, FRONT);
          memset((char *)start + a.nbytes, 0xa5, (a.nbytes + 15) / 16 * 16 - a.nbytes);
          break;
        }
    return wrong.empty() ? (Result)OK : error(wrong.rfind("an access", 0) ? LAUNCH_FAILED : ILLEGAL_ADDRESS, f->name + ": " + wrong);
  });
}
API cuLaunchHostFunc(Stream *s, void (*call)(void *), void *given) {
  IN_CONTEXT;
  return submit(s, [=] { call(given); return OK; });
}
API cuGetErrorString(Result code, const char **text) {
  static thread_local std::string kept;
  LOCKED;
  kept = last_error.empty() ? "error " + std::to_string(code) : last_error;
  *text = kept.c_str();
  return OK;
}
API cuGetErrorName(Result, const char **text) { *text = "CUDA_ERROR"; return OK; }
API cuProfilerStart(void) { return OK; }
API cuProfilerStop(void) { return OK; }
