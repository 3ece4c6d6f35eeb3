// Makes CUDA C compile as C++: the language's names, barriers, shuffles, votes, atomics, conversions, and tensor-core products.
// Included before the source of a module. It includes no header of the C++ library: compiling has to be quick.
// Every parameter of a kernel has eight bytes; shared memory is dynamic (`extern __shared__`, which build.py rewrites).
#pragma once
#include "block.h"
#define DUO_EMU 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define EMU static inline

extern "C" { extern EmuBlock *emu_block; }
__attribute__((visibility("default"))) EmuBlock *emu_block;  // set by whoever loads the module
#define threadIdx (emu_block->current->index)
#define blockIdx (emu_block->block)
#define blockDim (emu_block->block_size)
#define gridDim (emu_block->grid_size)
#define warpSize 32

typedef EmuDim uint3;
typedef EmuDim dim3;
#define EMU_VECTORS(T, N)                                                                    \
  struct N##2 { T x, y; } __align__(2 * sizeof(T));                                          \
  struct N##4 { T x, y, z, w; } __align__(sizeof(T) > 4 ? 16 : 4 * sizeof(T));               \
  EMU N##2 make_##N##2(T x, T y) { return {x, y}; }                                          \
  EMU N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float) EMU_VECTORS(double, double) EMU_VECTORS(int, int) EMU_VECTORS(unsigned, uint)

// ------------------------------------------------------------------------------------------------------ barriers, collectives
#define EMU_TEXT2(x) #x
#define EMU_TEXT(x) EMU_TEXT2(x)
#define EMU_HERE(what) what " at line " EMU_TEXT(__LINE__)
#define __syncthreads() emu_block->wait(EMU_BLOCK, 0, EMU_HERE("__syncthreads"))
#define __syncwarp(...) emu_block->wait(EMU_WARP, emu_mask(__VA_ARGS__), "__syncwarp")
EMU unsigned emu_mask(unsigned mask = 0xffffffffu) { return mask; }
EMU void __threadfence() {}
EMU void __threadfence_block() {}
EMU int __syncthreads_count(int p) {
  emu_block->votes += p != 0;
  emu_block->wait(EMU_BLOCK, 0, "__syncthreads_count");
  int votes = emu_block->votes;
  emu_block->wait(EMU_BLOCK, 0, "__syncthreads_count");
  emu_block->votes = 0;
  emu_block->wait(EMU_BLOCK, 0, "__syncthreads_count");
  return votes;
}
EMU int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
EMU int __syncthreads_and(int p) { return __syncthreads_count(!p) == 0; }

EMU int emu_lane() { return emu_block->current->linear & 31; }
EMU EmuWarp &emu_warp() { return emu_block->warps[emu_block->current->linear >> 5]; }

// The value that lane `source` posts; from a lane outside the mask, or one that has returned, comes nonsense, as in CUDA.
template <class T> EMU T emu_exchange(unsigned mask, T value, int source, const char *what) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  EmuWarp &warp = emu_warp();
  warp.post[emu_lane()][0] = 0;
  __builtin_memcpy(&warp.post[emu_lane()][0], &value, sizeof value);
  emu_block->wait(EMU_WARP, mask, what);
  unsigned long long nonsense = 0xfefefefefefefefeull;
  T result;
  __builtin_memcpy(&result, mask >> source & 1 ? &warp.seen[source][0] : &nonsense, sizeof result);
  return result;
}
template <class T> EMU T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emu_exchange(mask, v, (emu_lane() & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T> EMU T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  int lane = emu_lane(), source = lane ^ bits;
  return emu_exchange(mask, v, source / width > lane / width ? lane : source, "__shfl_xor_sync");
}
template <class T> EMU T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  int lane = emu_lane(), source = lane + (int)by;
  return emu_exchange(mask, v, source / width != lane / width ? lane : source, "__shfl_down_sync");
}
template <class T> EMU T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  int lane = emu_lane();
  return emu_exchange(mask, v, (lane & (width - 1)) < (int)by ? lane : lane - (int)by, "__shfl_up_sync");
}
EMU unsigned __ballot_sync(unsigned mask, int p) {
  EmuWarp &warp = emu_warp();
  warp.post[emu_lane()][0] = p != 0;
  emu_block->wait(EMU_WARP, mask, "__ballot_sync");
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) votes |= (mask >> i & 1 ? (unsigned)(warp.seen[i][0] & 1) : 0u) << i;
  return votes;
}
EMU int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
EMU int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

// ---------------------------------------------------------------------------------- atomics: one thread runs at a time
#define EMU_ATOMIC(name, next)                                                               \
  template <class T, class U> EMU T name(T *p, U given) { T v = (T)given, old = *p; *p = (next); return old; }
EMU_ATOMIC(atomicAdd, old + v) EMU_ATOMIC(atomicSub, old - v) EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMax, old > v ? old : v) EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicOr, old | v) EMU_ATOMIC(atomicAnd, old & v) EMU_ATOMIC(atomicXor, old ^ v)
template <class T> EMU T atomicCAS(T *p, T expected, T v) { T old = *p; if (old == expected) *p = v; return old; }

// ---------------------------------------------------------------------------------------------------- arithmetic, bits
#define EMU_MATH1(name)                                                                      \
  extern "C" double name(double);                                                            \
  extern "C" float name##f(float);                                                           \
  EMU float name(float x) { return __builtin_##name##f(x); }
EMU_MATH1(fabs) EMU_MATH1(sqrt) EMU_MATH1(floor) EMU_MATH1(ceil) EMU_MATH1(trunc) EMU_MATH1(rint)
extern "C" double copysign(double, double);
extern "C" float copysignf(float, float);
EMU float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
EMU float fminf(float a, float b) { return __builtin_fminf(a, b); }
EMU float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
EMU float fmin(float a, float b) { return __builtin_fminf(a, b); }
EMU double fmax(double a, double b) { return __builtin_fmax(a, b); }
EMU double fmin(double a, double b) { return __builtin_fmin(a, b); }
EMU float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMU double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
EMU float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMU double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#define EMU_MIN_MAX(T)                                                                       \
  EMU T min(T a, T b) { return b < a ? b : a; }                                              \
  EMU T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int) EMU_MIN_MAX(unsigned) EMU_MIN_MAX(long long) EMU_MIN_MAX(unsigned long long)
#define EMU_BITS(name, From, To) EMU To name(From x) { To y; __builtin_memcpy(&y, &x, sizeof y); return y; }
EMU_BITS(__float_as_int, float, int) EMU_BITS(__int_as_float, int, float)
EMU_BITS(__float_as_uint, float, unsigned) EMU_BITS(__uint_as_float, unsigned, float)
EMU_BITS(__double_as_longlong, double, long long) EMU_BITS(__longlong_as_double, long long, double)
EMU int __popc(unsigned x) { return __builtin_popcount(x); }
EMU int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
EMU int __ffs(int x) { return __builtin_ffs(x); }
EMU unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
EMU unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class T> EMU T __ldg(const T *p) { return *p; }
template <class T> EMU T __ldcs(const T *p) { return *p; }
template <class T> EMU void __stcs(T *p, T v) { *p = v; }

// ------------------------------------------- tensor cores and copies to shared memory, as duo names them (layouts: PTX manual)
EMU float emu_half(unsigned bits, int upper, bool bf16) {
  unsigned short h = (unsigned short)(upper ? bits >> 16 : bits);
  if (bf16) return __uint_as_float((unsigned)h << 16);
  _Float16 f;
  __builtin_memcpy(&f, &h, 2);
  return (float)f;
}
EMU float emu_tf32(unsigned bits) { return __uint_as_float(bits & 0xffffe000u); }

// d += a x b of a warp: 16 x 8 results, `depth` products each. Every lane posts its registers, then computes its own four results.
template <class Element>
EMU void emu_mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int depth, const char *what, Element element) {
  EmuWarp &warp = emu_warp();
  const int lane = emu_lane(), group = lane >> 2, quad = lane & 3, half = depth / 2, each = half / 4;
  __builtin_memcpy(warp.post[lane], a, 16);
  __builtin_memcpy(warp.post[lane] + 2, b, 8);
  emu_block->wait(EMU_WARP, 0xffffffffu, what);
  for (int i = 0; i < 4; i++) {
    const int row = group + (i >= 2 ? 8 : 0), column = quad * 2 + (i & 1);
    float sum = d[i];
    for (int k = 0; k < depth; k++) {
      const int within = k % half, upper = k / half;
      unsigned left[4], right[2];
      __builtin_memcpy(left, warp.seen[(row & 7) * 4 + within / each], 16);
      __builtin_memcpy(right, warp.seen[column * 4 + within / each] + 2, 8);
      sum += element(left[upper * 2 + (row >= 8)], within % each) * element(right[upper], within % each);
    }
    d[i] = sum;
  }
}
EMU void duo_mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {  // m16n8k16
  emu_mma(d, a, b, 16, "mma.bf16", [](unsigned bits, int upper) { return emu_half(bits, upper, true); });
}
EMU void duo_mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {  // m16n8k16
  emu_mma(d, a, b, 16, "mma.f16", [](unsigned bits, int upper) { return emu_half(bits, upper, false); });
}
EMU void duo_mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {  // m16n8k8
  emu_mma(d, a, b, 8, "mma.tf32", [](unsigned bits, int) { return emu_tf32(bits); });
}
EMU unsigned duo_to_tf32(unsigned x) {  // nearest, ties away from zero
  return (x & 0x7f800000u) == 0x7f800000u ? x : (x + 0x1000u) & 0xffffe000u;
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. It gets two neighbours of row l / 4, or of column l / 4.
EMU void emu_ldmatrix4(unsigned (&r)[4], const void *row, bool transposed) {
  EmuWarp &warp = emu_warp();
  const int lane = emu_lane();
  if ((unsigned long long)row % 16) emu_block->complaint = "ldmatrix of a misaligned row";
  __builtin_memcpy(warp.post[lane], row, 16);
  warp.post[lane][2] = (unsigned long long)row / 16 % 8;
  emu_block->wait(EMU_WARP, 0xffffffffu, "ldmatrix");
  unsigned banks = 0;  // that the eight rows of the lane's matrix lie in
  for (int i = 0; i < 8; i++) banks |= 1u << warp.seen[lane / 8 * 8 + i][2];
  if (banks != 0xff) emu_block->complaint = "ldmatrix of rows in the same banks";
  for (int m = 0; m < 4; m++) {
    unsigned short pair[2];
    for (int i = 0; i < 2; i++) {
      const int at = lane % 4 * 2 + i, line = transposed ? at : lane / 4, place = transposed ? lane / 4 : at;
      __builtin_memcpy(&pair[i], (const char *)warp.seen[m * 8 + line] + 2 * place, 2);
    }
    __builtin_memcpy(&r[m], pair, 4);
  }
}
EMU void duo_ldmatrix4(unsigned (&r)[4], const void *row) { emu_ldmatrix4(r, row, false); }
EMU void duo_ldmatrix4_trans(unsigned (&r)[4], const void *row) { emu_ldmatrix4(r, row, true); }

// Copies that run on their own: as late as the program allows, when it waits for their group, or at once, under the second schedule.
struct EmuCopy { void *to; const void *from; int there, bytes; };
struct EmuCopies { EmuCopy list[256]; int count, ends[16], groups; };
static EmuCopies emu_copies[1024];  // of each thread: those that have not run, and where groups end among them
EMU void emu_copy(const EmuCopy &c) {
  if (c.there) __builtin_memcpy(c.to, c.from, (unsigned long)c.bytes);
  else __builtin_memset(c.to, 0, (unsigned long)c.bytes);
}
template <int BYTES> EMU void duo_copy_async(void *to, const void *from, bool there) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  EmuCopies &all = emu_copies[emu_block->current->linear];
  if (((unsigned long long)to | (unsigned long long)from) % BYTES) emu_block->complaint = "cp.async of misaligned memory";
  if (all.count == 256) __builtin_trap();
  const EmuCopy copy = {to, from, there, BYTES};
  if (emu_block->eager) emu_copy(copy);
  else all.list[all.count++] = copy;
}
EMU void duo_commit() {
  EmuCopies &all = emu_copies[emu_block->current->linear];
  if (all.groups == 16) __builtin_trap();
  all.ends[all.groups++] = all.count;
}
template <int N> EMU void duo_arrived() {
  EmuCopies &all = emu_copies[emu_block->current->linear];
  const int done = all.groups - N;
  if (done <= 0) return;
  const int upto = all.ends[done - 1];
  for (int i = 0; i < upto; i++) emu_copy(all.list[i]);
  for (int i = upto; i < all.count; i++) all.list[i - upto] = all.list[i];
  for (int i = done; i < all.groups; i++) all.ends[i - done] = all.ends[i] - upto;
  all.count -= upto, all.groups = N;
}

// ----------------------------------------------------------------------------------------------------------- entry points
template <class T> EMU T emu_argument(const char *at) {
  static_assert(sizeof(T) == 8, "every parameter of a kernel has eight bytes");
  T value;
  __builtin_memcpy(&value, at, 8);
  return value;
}
template <int... N> struct EmuNumbers {};
template <class... A> constexpr int emu_count(void (*)(A...)) { return sizeof...(A); }
template <class... A, int... N> EMU void emu_unpack(void (*kernel)(A...), const char *arguments, EmuNumbers<N...>) {
  kernel(emu_argument<A>(arguments + 8 * N)...);
}
template <class... A> EMU void emu_call(void (*kernel)(A...), const char *arguments) {
  emu_unpack(kernel, arguments, EmuNumbers<__integer_pack(sizeof...(A))...>());
}
#define EMU_KERNEL(name)                                                                     \
  static void emu_run_##name(const char *arguments) {                                        \
    EmuCopies &copies = emu_copies[emu_block->current->linear];                              \
    copies.count = copies.groups = 0;                                                        \
    emu_call(name, arguments);                                                               \
  }                                                                                          \
  extern "C" __attribute__((visibility("default"))) EmuKernel emu_kernel_##name;             \
  EmuKernel emu_kernel_##name = {emu_run_##name, emu_count(name)};
