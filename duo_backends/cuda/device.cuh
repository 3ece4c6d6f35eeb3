// What every kernel of duo starts with: conversions, checks, reductions' operators. Compiled by nvcc, by NVRTC (no includes), and by a
// C++ compiler for the emulator of the tests, which defines DUO_EMU and includes its own header first.
// f16 and bf16 values are their bits, in unsigned short. Arithmetic is rounded as IEEE 754 says: compile with -fmad=false -ftz=false
// -prec-div=true -prec-sqrt=true.
#define DUO_FN static __device__ __forceinline__

// A vector of memory, read and written as one access of up to 16 bytes.
template <class T, int N> struct __align__(sizeof(T) * N) Pack { T v[N]; };

// ------------------------------------------------------------------------------------------------------------ conversions
DUO_FN float duo_from_bf16(unsigned short x) { return __uint_as_float((unsigned)x << 16); }

// Adds 0x7fff plus the last kept bit and keeps the upper half; a NaN stays a quiet NaN.
DUO_FN unsigned short duo_to_bf16(float x) {
  unsigned bits = __float_as_uint(x), upper = bits >> 16;
  return (unsigned short)(x != x ? upper | 0x40u : (bits + 0x7fffu + (upper & 1u)) >> 16);
}

#ifdef DUO_EMU
DUO_FN float duo_from_f16(unsigned short x) { _Float16 h; __builtin_memcpy(&h, &x, 2); return (float)h; }
DUO_FN unsigned short duo_to_f16(float x) { _Float16 h = (_Float16)x; unsigned short r; __builtin_memcpy(&r, &h, 2); return r; }
#else
DUO_FN float duo_from_f16(unsigned short x) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x)); return f; }
DUO_FN unsigned short duo_to_f16(float x) { unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
#endif

// x * 2^y rounded once, for an integral y: two normal powers, from the low bits y + 2 * bias of a sum; the first product is exact.
DUO_FN float duo_ldexp(float x, float y) {
  unsigned twice = __float_as_uint(y + 12583166.0f), half = twice >> 1;
  return x * __uint_as_float(half << 23) * __uint_as_float((twice - half) << 23);
}
DUO_FN double duo_ldexp(double x, double y) {
  unsigned long long twice = (unsigned long long)__double_as_longlong(y + 6755399441057790.0), half = twice >> 1;
  return x * __longlong_as_double((long long)(half << 52)) * __longlong_as_double((long long)((twice - half) << 52));
}

// f32 "rounded to odd": toward zero, the last bit set when anything was lost. A second rounding, to a narrower type, is then as good as one
// (Boldo & Melquiond, "When double rounding is odd", 2005).
DUO_FN float duo_odd(double x) {
  float nearest = (float)x;
  unsigned bits = __float_as_uint(nearest);
  double back = (double)nearest;
  if (fabs(back) > fabs(x)) bits -= 1;
  if (back < x || back > x) bits |= 1;
  return __uint_as_float(bits);
}
DUO_FN float duo_odd(int x) { return duo_odd((double)x); }
DUO_FN float duo_odd(long long x) {  // cut to its upper bits, with a sticky bit, it is exact in f64
  unsigned long long m = x < 0 ? 0ull - (unsigned long long)x : (unsigned long long)x;
  if (m >= 1ull << 53) m = (m & ~0x7ffull) | ((m & 0x7ffull) ? 0x800ull : 0ull);
  double wide = (double)m;
  return duo_odd(x < 0 ? -wide : wide);
}

// ----------------------------------------------------------------------------------------------------------------- checks
// 0 <= index < bound, else reports and gives 0. Of all reports the one of the lowest point stays (status: lock, point + 1, site, index, bound).
static __device__ __noinline__ void duo_report(long long *status, long long point, long long site, long long index, long long bound) {
  unsigned long long *lock = (unsigned long long *)status;
  for (bool done = false; !done;) {
    if (atomicCAS(lock, 0ull, 1ull) == 0ull) {
      volatile long long *s = status;
      if (s[1] == 0 || point + 1 < s[1]) { s[1] = point + 1; s[2] = site; s[3] = index; s[4] = bound; }
      __threadfence();
      atomicExch(lock, 0ull);
      done = true;
    }
  }
}
DUO_FN long long duo_check(long long *status, long long point, long long site, long long index, long long bound) {
  if ((unsigned long long)index < (unsigned long long)bound) return index;
  duo_report(status, point, site, index, bound);
  return 0;
}

// --------------------------------------------------------------------------------------------------- reductions' operators
// IEEE 754-2019 maximum and minimum: NaN wins, -0 < +0.
DUO_FN float duo_max(float x, float y) {
  if (x != x || y != y) return x + y;
  if (x == y) return __uint_as_float(__float_as_uint(x) & __float_as_uint(y));
  return x > y ? x : y;
}
DUO_FN float duo_min(float x, float y) {
  if (x != x || y != y) return x + y;
  if (x == y) return __uint_as_float(__float_as_uint(x) | __float_as_uint(y));
  return x < y ? x : y;
}
DUO_FN double duo_max(double x, double y) {
  if (x != x || y != y) return x + y;
  if (x == y) return __longlong_as_double(__double_as_longlong(x) & __double_as_longlong(y));
  return x > y ? x : y;
}
DUO_FN double duo_min(double x, double y) {
  if (x != x || y != y) return x + y;
  if (x == y) return __longlong_as_double(__double_as_longlong(x) | __double_as_longlong(y));
  return x < y ? x : y;
}
template <class T> DUO_FN T duo_max(T x, T y) { return x > y ? x : y; }
template <class T> DUO_FN T duo_min(T x, T y) { return x < y ? x : y; }

// (value, index) of the first NaN, else of the extremum with the lowest index.
template <class T> struct Best { T value; long long index; };
template <bool MAX, class T> DUO_FN Best<T> duo_best(Best<T> a, Best<T> b) {
  bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (!a_nan && a.value != b.value) return (MAX ? a.value > b.value : a.value < b.value) ? a : b;
  return a.index <= b.index ? a : b;
}

// Among the threads that hold the lanes of a chunk, 16 or fewer: the value of the thread `d` further, and that of the first of `n`.
template <class T> DUO_FN T duo_down(T x, int d) { return (T)__shfl_down_sync(0xffffffffu, x, d, 16); }
template <class T> DUO_FN T duo_first(T x, int n) { return (T)__shfl_sync(0xffffffffu, x, 0, n); }
template <class T> DUO_FN Best<T> duo_down(Best<T> x, int d) { x.value = duo_down(x.value, d); x.index = duo_down(x.index, d); return x; }
template <class T> DUO_FN Best<T> duo_first(Best<T> x, int n) { x.value = duo_first(x.value, n); x.index = duo_first(x.index, n); return x; }
