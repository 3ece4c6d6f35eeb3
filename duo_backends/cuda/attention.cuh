// Scaled dot-product attention and its gradient, tiled, in the order that duo_ir/ops/attention.py defines: keys (and, backward, queries) in
// blocks of 64, sums within a block by fma in ascending order from +0, blocks added in ascending order. With CAUSAL, whole runs of 32 keys
// are left out. Widths go through shared memory in slabs of 64 columns, what is summed over in runs of DEPTH: 64, or less where shared memory is
// short. FROM to TO number the slabs of a result that a launch computes: all, or some where registers are short.
// A kernel gives a Storage (how elements are stored and what they are computed in) and a Math (the contract's exp and log).

struct StoredF32 { typedef float Memory; typedef float Compute; static __device__ __forceinline__ float in(float x) { return x; } static __device__ __forceinline__ float out(float x) { return x; } };
struct StoredF64 { typedef double Memory; typedef double Compute; static __device__ __forceinline__ double in(double x) { return x; } static __device__ __forceinline__ double out(double x) { return x; } };
struct StoredF16 { typedef unsigned short Memory; typedef float Compute; static __device__ __forceinline__ float in(unsigned short x) { return duo_from_f16(x); } static __device__ __forceinline__ unsigned short out(float x) { return duo_to_f16(x); } };
struct StoredBF16 { typedef unsigned short Memory; typedef float Compute; static __device__ __forceinline__ float in(unsigned short x) { return duo_from_bf16(x); } static __device__ __forceinline__ unsigned short out(float x) { return duo_to_bf16(x); } };

// Element [r, c] is p[r*row + c*column].
template <class T> struct View {
  T *p;
  long long row, column;
  __device__ __forceinline__ T &at(long long r, long long c) const { return p[r * row + c * column]; }
};

struct MaskView {
  const void *p;
  long long row, column;
};

enum { NO_MASK, BOOL_MASK, NUMBER_MASK };
enum { SLAB = 64, STRIDE = SLAB + 4, HALF = 32 };

DUO_FN float duo_fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
DUO_FN double duo_fma(double x, double y, double z) { return __fma_rn(x, y, z); }
DUO_FN void duo_four(const float *p, float (&x)[4]) { *(Pack<float, 4> *)x = *(const Pack<float, 4> *)p; }
DUO_FN void duo_four(const double *p, double (&x)[4]) { for (int i = 0; i < 4; ++i) x[i] = p[i]; }
template <class C> DUO_FN C duo_minus_infinity() { return -(C)__int_as_float(0x7f800000); }
DUO_FN int duo_least(long long x, int y) { return x < y ? (int)x : y; }

// sum[i][j] = fma(x[k][x0 + i], y[k][y0 + j], .) for k < n; x and y are slabs.
template <class C> DUO_FN void duo_products(C (&sum)[4][4], const C *x, int x0, const C *y, int y0, int from, int n) {
  for (int k = from; k < n; ++k) {
    C a[4], b[4];
    duo_four(x + k * STRIDE + x0, a);
    duo_four(y + k * STRIDE + y0, b);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = duo_fma(a[i], b[j], sum[i][j]);
  }
}
template <class C> DUO_FN void duo_zero(C (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = (C)0;
}

// A slab of a matrix: rows first..., `rows` of them, columns from..., `columns` of them, times `scale` (1: as it is); +0 beyond. 64 columns of DEPTH
// rows; TURNED, as [column][row]: 64 rows of DEPTH columns.
template <class S, bool TURNED, bool SCALED, int THREADS, int DEPTH>
DUO_FN void duo_slab(typename S::Compute *to, View<const typename S::Memory> x, long long first, int rows, int from, int columns, typename S::Compute scale) {
  enum { WIDTH = TURNED ? DEPTH : SLAB };
  for (int u = threadIdx.x; u < SLAB * DEPTH; u += THREADS) {
    const int r = u / WIDTH, c = u % WIDTH;
    typename S::Compute value = 0;
    if (r < rows && c < columns) {
      value = S::in(x.at(first + r, from + c));
      if (SCALED) value = value * scale;
    }
    to[TURNED ? c * STRIDE + r : r * STRIDE + c] = value;
  }
}

template <int MASK, class C> DUO_FN C duo_masked(C s, MaskView mask, long long i, long long j) {
  if (MASK == BOOL_MASK) return ((const unsigned char *)mask.p)[i * mask.row + j * mask.column] ? s : duo_minus_infinity<C>();
  if (MASK == NUMBER_MASK) return s + ((const C *)mask.p)[i * mask.row + j * mask.column];
  return s;
}

// ---------------------------------------------------------------------------------------------------------------- forward
// A block takes 32 queries, whose number is a multiple of 32; 128 threads, each 4 queries by 4 keys or columns.
template <class S, class F, int D, int E, bool CAUSAL, int MASK, int DEPTH, int FROM, int TO>
DUO_FN void duo_attention(View<const typename S::Memory> q, View<const typename S::Memory> k, View<const typename S::Memory> v, MaskView mask,
                          View<typename S::Memory> out, View<typename S::Compute> lse, long long i0, long long queries, long long keys,
                          typename S::Compute scale, void *shared) {
  typedef typename S::Compute C;
  enum { THREADS = 128, SLABS = TO - FROM };
  C *const bs = (C *)shared, *const ks = bs + DEPTH * STRIDE, *const ps = ks + DEPTH * STRIDE, *const shrink = ps + SLAB * STRIDE, *const totals = shrink + HALF;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, rows = duo_least(queries - i0, HALF);
  const long long limit = CAUSAL && i0 + HALF < keys ? i0 + HALF : keys;
  C m[4], o[SLABS][4][4], total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) m[i] = duo_minus_infinity<C>();
#pragma unroll
  for (int e = 0; e < SLABS; ++e) duo_zero(o[e]);
  for (long long j0 = 0; j0 < limit; j0 += SLAB) {
    const int n = duo_least(limit - j0, SLAB);
    C s[4][4];
    duo_zero(s);
    for (int d = 0; d < D; d += DEPTH) {
      const int width = D - d < DEPTH ? D - d : DEPTH;
      __syncthreads();
      if (D > DEPTH || j0 == 0) duo_slab<S, true, true, THREADS, DEPTH>(bs, q, i0, rows, d, width, scale);
      duo_slab<S, true, false, THREADS, DEPTH>(ks, k, j0, n, d, width, scale);
      __syncthreads();
      duo_products(s, bs, ty * 4, ks, tx * 4, 0, width);
    }
    C a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      C most = m[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const long long query = i0 + ty * 4 + i, key = j0 + tx * 4 + j;
        if (query < queries && tx * 4 + j < n) {
          s[i][j] = duo_masked<MASK>(s[i][j], mask, query, key);
          if (CAUSAL && key > query) s[i][j] = duo_minus_infinity<C>();
          most = fmax(most, s[i][j]);
        }
      }
#pragma unroll
      for (int d = 8; d; d /= 2) most = fmax(most, __shfl_xor_sync(0xffffffffu, most, d, 16));
      const C safe = most == duo_minus_infinity<C>() ? (C)0 : most;
      a[i] = F::exp(m[i] - safe);
      m[i] = most;
#pragma unroll
      for (int j = 0; j < 4; ++j) ps[(tx * 4 + j) * STRIDE + ty * 4 + i] = F::exp(s[i][j] - safe);
      if (tx == 0) shrink[ty * 4 + i] = a[i];
    }
    __syncthreads();
    if (threadIdx.x < HALF) {
      C added = 0;
      for (int j = 0; j < n; ++j) added = added + ps[j * STRIDE + threadIdx.x];
      total = total * shrink[threadIdx.x] + added;
    }
#pragma unroll
    for (int e = 0; e < SLABS; ++e) {
      const int column = (FROM + e) * SLAB;
      C sum[4][4];
      duo_zero(sum);
#pragma unroll
      for (int k = 0; k < SLAB; k += DEPTH) {
        if (k && k >= n) break;
        if (e || k) __syncthreads();
        duo_slab<S, false, false, THREADS, DEPTH>(ks, v, j0 + k, n - k, column, E - column < SLAB ? E - column : SLAB, scale);
        __syncthreads();
        duo_products(sum, ps + k * STRIDE, ty * 4, ks, tx * 4, 0, DEPTH == SLAB || n - k < DEPTH ? n - k : DEPTH);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o[e][i][j] = o[e][i][j] * a[i] + sum[i][j];
    }
  }
  if (threadIdx.x < HALF) totals[threadIdx.x] = total;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const long long query = i0 + ty * 4 + i;
    if (query >= queries) continue;
    const C l = totals[ty * 4 + i], safe = m[i] == duo_minus_infinity<C>() ? (C)0 : m[i];
    const bool none = l == 0;
    const C inverse = (C)1 / (none ? (C)1 : l);
    if (FROM == 0 && tx == 0) lse.at(query, 0) = none ? -duo_minus_infinity<C>() : safe + F::log(l);
#pragma unroll
    for (int e = 0; e < SLABS; ++e)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if ((FROM + e) * SLAB + tx * 4 + j < E) out.at(query, (FROM + e) * SLAB + tx * 4 + j) = S::out(o[e][i][j] * inverse);
  }
}

// --------------------------------------------------------------------------------------------------------------- backward
// p and ds of 64 queries and 64 keys, by 256 threads: into shared memory as [query][key], or [key][query] where TURNED. Who reads them waits
// first, and x and y may still be read until then.
template <class S, class F, int D, int E, bool CAUSAL, int MASK, bool TURNED, int DEPTH>
DUO_FN void duo_slopes(View<const typename S::Memory> q, View<const typename S::Memory> k, View<const typename S::Memory> v, View<const typename S::Memory> g,
                       View<const typename S::Compute> lse, View<const typename S::Compute> delta, MaskView mask, long long i0, int rows, long long j0, int columns,
                       typename S::Compute scale, typename S::Compute *x, typename S::Compute *y, typename S::Compute *p, typename S::Compute *ds) {
  typedef typename S::Compute C;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  C s[4][4], dp[4][4];
  duo_zero(s);
  duo_zero(dp);
  for (int d = 0; d < D; d += DEPTH) {
    const int width = D - d < DEPTH ? D - d : DEPTH;
    __syncthreads();
    duo_slab<S, true, true, 256, DEPTH>(x, q, i0, rows, d, width, scale);
    duo_slab<S, true, false, 256, DEPTH>(y, k, j0, columns, d, width, scale);
    __syncthreads();
    duo_products(s, x, ty * 4, y, tx * 4, 0, width);
  }
  for (int e = 0; e < E; e += DEPTH) {
    const int width = E - e < DEPTH ? E - e : DEPTH;
    __syncthreads();
    duo_slab<S, true, false, 256, DEPTH>(x, g, i0, rows, e, width, scale);
    duo_slab<S, true, false, 256, DEPTH>(y, v, j0, columns, e, width, scale);
    __syncthreads();
    duo_products(dp, x, ty * 4, y, tx * 4, 0, width);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = ty * 4 + i;
    const C sum = r < rows ? lse.at(i0 + r, 0) : (C)0, slope = r < rows ? delta.at(i0 + r, 0) : (C)0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = tx * 4 + j;
      if (r < rows && c < columns) {
        s[i][j] = duo_masked<MASK>(s[i][j], mask, i0 + r, j0 + c);
        if (CAUSAL && j0 + c > i0 + r) s[i][j] = duo_minus_infinity<C>();
      }
      const C weight = F::exp(s[i][j] - sum);
      const int at = TURNED ? c * STRIDE + r : r * STRIDE + c;
      p[at] = weight;
      ds[at] = weight * (dp[i][j] - slope);
    }
  }
}

// dk and dv of 64 keys.
template <class S, class F, int D, int E, bool CAUSAL, int MASK, int DEPTH, int FROM, int TO, int V_FROM, int V_TO>
DUO_FN void duo_attention_keys(View<const typename S::Memory> q, View<const typename S::Memory> k, View<const typename S::Memory> v, View<const typename S::Memory> g,
                               View<const typename S::Compute> lse, View<const typename S::Compute> delta, MaskView mask, View<typename S::Memory> dk,
                               View<typename S::Memory> dv, long long j0, long long queries, long long keys, typename S::Compute scale, void *shared) {
  typedef typename S::Compute C;
  enum { K_SLABS = TO - FROM, V_SLABS = V_TO - V_FROM };
  C *const x = (C *)shared, *const y = x + DEPTH * STRIDE, *const p = y + DEPTH * STRIDE, *const ds = p + SLAB * STRIDE;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, columns = duo_least(keys - j0, SLAB);
  C to_k[K_SLABS ? K_SLABS : 1][4][4], to_v[V_SLABS ? V_SLABS : 1][4][4];
#pragma unroll
  for (int d = 0; d < K_SLABS; ++d) duo_zero(to_k[d]);
#pragma unroll
  for (int e = 0; e < V_SLABS; ++e) duo_zero(to_v[e]);
  for (long long i0 = CAUSAL ? j0 : 0; i0 < queries; i0 += SLAB) {
    const int rows = duo_least(queries - i0, SLAB);
    duo_slopes<S, F, D, E, CAUSAL, MASK, false, DEPTH>(q, k, v, g, lse, delta, mask, i0, rows, j0, columns, scale, x, y, p, ds);
    // keys of the second half of a block on the diagonal take part in the second half of its queries alone
    const int from = CAUSAL && i0 == j0 && ty * 4 >= HALF ? HALF : 0;
#pragma unroll
    for (int e = 0; e < V_SLABS; ++e) {
      const int column = (V_FROM + e) * SLAB;
      C sum[4][4];
      duo_zero(sum);
#pragma unroll
      for (int k = 0; k < SLAB; k += DEPTH) {
        if (k && k >= rows) break;
        __syncthreads();
        duo_slab<S, false, false, 256, DEPTH>(x, g, i0 + k, rows - k, column, E - column < SLAB ? E - column : SLAB, scale);
        __syncthreads();
        duo_products(sum, p + k * STRIDE, ty * 4, x, tx * 4, from > k ? from - k : 0, DEPTH == SLAB || rows - k < DEPTH ? rows - k : DEPTH);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) to_v[e][i][j] = to_v[e][i][j] + sum[i][j];
    }
#pragma unroll
    for (int d = 0; d < K_SLABS; ++d) {
      const int column = (FROM + d) * SLAB;
      C sum[4][4];
      duo_zero(sum);
#pragma unroll
      for (int k = 0; k < SLAB; k += DEPTH) {
        if (k && k >= rows) break;
        __syncthreads();
        duo_slab<S, false, true, 256, DEPTH>(x, q, i0 + k, rows - k, column, D - column < SLAB ? D - column : SLAB, scale);
        __syncthreads();
        duo_products(sum, ds + k * STRIDE, ty * 4, x, tx * 4, from > k ? from - k : 0, DEPTH == SLAB || rows - k < DEPTH ? rows - k : DEPTH);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) to_k[d][i][j] = to_k[d][i][j] + sum[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (ty * 4 + i >= columns) continue;
#pragma unroll
    for (int d = 0; d < K_SLABS; ++d)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if ((FROM + d) * SLAB + tx * 4 + j < D) dk.at(j0 + ty * 4 + i, (FROM + d) * SLAB + tx * 4 + j) = S::out(to_k[d][i][j]);
#pragma unroll
    for (int e = 0; e < V_SLABS; ++e)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if ((V_FROM + e) * SLAB + tx * 4 + j < E) dv.at(j0 + ty * 4 + i, (V_FROM + e) * SLAB + tx * 4 + j) = S::out(to_v[e][i][j]);
  }
}

// dq of 64 queries.
template <class S, class F, int D, int E, bool CAUSAL, int MASK, int DEPTH, int FROM, int TO>
DUO_FN void duo_attention_queries(View<const typename S::Memory> q, View<const typename S::Memory> k, View<const typename S::Memory> v, View<const typename S::Memory> g,
                                  View<const typename S::Compute> lse, View<const typename S::Compute> delta, MaskView mask, View<typename S::Memory> dq,
                                  long long i0, long long queries, long long keys, typename S::Compute scale, void *shared) {
  typedef typename S::Compute C;
  enum { SLABS = TO - FROM };
  C *const x = (C *)shared, *const y = x + DEPTH * STRIDE, *const p = y + DEPTH * STRIDE, *const ds = p + SLAB * STRIDE;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, rows = duo_least(queries - i0, SLAB);
  C to_q[SLABS][4][4];
#pragma unroll
  for (int d = 0; d < SLABS; ++d) duo_zero(to_q[d]);
  for (long long j0 = 0; j0 < keys && (!CAUSAL || j0 <= i0); j0 += SLAB) {
    const int columns = duo_least(keys - j0, SLAB);
    duo_slopes<S, F, D, E, CAUSAL, MASK, true, DEPTH>(q, k, v, g, lse, delta, mask, i0, rows, j0, columns, scale, x, y, p, ds);
    const int seen = CAUSAL && i0 == j0 && ty * 4 < HALF && columns > HALF ? HALF : columns;
#pragma unroll
    for (int d = 0; d < SLABS; ++d) {
      const int column = (FROM + d) * SLAB;
      C sum[4][4];
      duo_zero(sum);
#pragma unroll
      for (int c = 0; c < SLAB; c += DEPTH) {
        if (c && c >= columns) break;
        __syncthreads();
        duo_slab<S, false, false, 256, DEPTH>(x, k, j0 + c, columns - c, column, D - column < SLAB ? D - column : SLAB, scale);
        __syncthreads();
        duo_products(sum, ds + c * STRIDE, ty * 4, x, tx * 4, 0, DEPTH == SLAB || seen - c < DEPTH ? seen - c : DEPTH);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) to_q[d][i][j] = to_q[d][i][j] + sum[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (ty * 4 + i >= rows) continue;
#pragma unroll
    for (int d = 0; d < SLABS; ++d)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if ((FROM + d) * SLAB + tx * 4 + j < D) dq.at(i0 + ty * 4 + i, (FROM + d) * SLAB + tx * 4 + j) = S::out(to_q[d][i][j] * scale);
  }
}
