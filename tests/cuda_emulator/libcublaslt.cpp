// A libcublasLt on the CPU, what duo calls of it: it looks at the descriptors as closely as the real one, or closer, and computes when the
// emulated stream gets there. Refusals are CUBLAS_STATUS_INVALID_VALUE (7) or NOT_SUPPORTED (15), with a line on stderr under DUO_EMU_VERBOSE.
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int
enum { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
static int refuse(int code, const char *why) {
  if (getenv("DUO_EMU_VERBOSE")) fprintf(stderr, "cublasLt emulator: %s\n", why);
  return code;
}

struct Handle { int magic; };
struct Product { int compute, scale, trans_a, trans_b, epilogue; uint64_t bias, aux; int64_t aux_ld, aux_stride; };
struct Layout { int type; uint64_t rows, columns; int64_t ld; int batch; int64_t stride; };
struct Preference { size_t workspace; unsigned alignment[4]; };
static const size_t WORKSPACE = 1000;
enum { VECTOR = 4 | 16 | 256 | 512 };  // epilogues with a bias or its gradient

API cublasLtCreate(Handle **h) { *h = new Handle{0x1357}; return OK; }
API cublasLtMatmulDescCreate(Product **p, int compute, int scale) {
  if ((compute != 68 && compute != 77) || scale != 0) return refuse(INVALID_VALUE, "compute or scale type");
  *p = new Product{compute, scale, 0, 0, 1, 0, 0, 0, 0};
  return OK;
}
API cublasLtMatmulDescDestroy(Product *p) { delete p; return OK; }
API cublasLtMatmulDescSetAttribute(Product *p, int what, const void *value, size_t n) {
  void *place = nullptr;
  size_t size = 4;
  if (what == 3) place = &p->trans_a;
  if (what == 4) place = &p->trans_b;
  if (what == 7) place = &p->epilogue;
  if (what == 8) place = &p->bias, size = 8;
  if (what == 11) place = &p->aux, size = 8;
  if (what == 12) place = &p->aux_ld, size = 8;
  if (what == 13) place = &p->aux_stride, size = 8;
  if (!place || n != size) return refuse(INVALID_VALUE, "an attribute of a product, or its size");
  memcpy(place, value, n);
  return OK;
}
API cublasLtMatrixLayoutCreate(Layout **l, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  if (type != 0 && type != 2 && type != 14) return refuse(INVALID_VALUE, "a layout's type");
  *l = new Layout{type, rows, columns, ld, 1, 0};
  return OK;
}
API cublasLtMatrixLayoutDestroy(Layout *l) { delete l; return OK; }
API cublasLtMatrixLayoutSetAttribute(Layout *l, int what, const void *value, size_t n) {
  if (what == 5 && n == 4) memcpy(&l->batch, value, n);
  else if (what == 6 && n == 8) memcpy(&l->stride, value, n);
  else return refuse(INVALID_VALUE, "an attribute of a layout, or its size");
  return OK;
}
API cublasLtMatmulPreferenceCreate(Preference **p) { *p = new Preference{0, {256, 256, 256, 256}}; return OK; }
API cublasLtMatmulPreferenceDestroy(Preference *p) { delete p; return OK; }
API cublasLtMatmulPreferenceSetAttribute(Preference *p, int what, const void *value, size_t n) {
  if (what == 1 && n == 8) memcpy(&p->workspace, value, n);
  else if (what >= 5 && what <= 8 && n == 4) memcpy(&p->alignment[what - 5], value, n);
  else return refuse(INVALID_VALUE, "an attribute of a preference, or its size");
  return OK;
}

static int check(const Product *p, const Layout *a, const Layout *b, const Layout *c, const Layout *d) {
  const uint64_t m = p->trans_a ? a->columns : a->rows, k = p->trans_a ? a->rows : a->columns;
  const uint64_t k2 = p->trans_b ? b->columns : b->rows, n = p->trans_b ? b->rows : b->columns;
  if (k != k2 || m != d->rows || n != d->columns || c->rows != d->rows || c->columns != d->columns) return refuse(INVALID_VALUE, "sizes do not fit");
  for (const Layout *l : {a, b, c, d})
    if (l->ld < (int64_t)l->rows || l->batch != d->batch) return refuse(INVALID_VALUE, "a leading dimension or a batch count");
  if (a->type != b->type || c->type != d->type) return refuse(NOT_SUPPORTED, "mixed types");
  if (d->type != a->type && d->type != 0) return refuse(NOT_SUPPORTED, "the result's type");
  if ((p->compute == 77) != (a->type == 0)) return refuse(NOT_SUPPORTED, "the compute type");
  bool known = false;
  for (int e : {1, 2, 4, 6, 32, 36, 130, 134, 136, 152, 192, 208, 256, 512}) known = known || p->epilogue == e;
  if (!known) return refuse(NOT_SUPPORTED, "the epilogue");
  if ((p->epilogue & VECTOR) && !p->bias) return refuse(INVALID_VALUE, "no bias, or nowhere for its gradient");
  const int unit = p->epilogue & (2 | 8) ? 128 : 8;  // a mask is counted in bits
  if (p->epilogue & 128 && (!p->aux || p->aux_ld < (int64_t)d->rows || p->aux_ld % unit)) return refuse(INVALID_VALUE, "the auxiliary matrix");
  if (p->epilogue & (128 | 256 | 512) && p->epilogue != 192 && d->batch > 1) return refuse(NOT_SUPPORTED, "a batch with that epilogue");
  return OK;
}
API cublasLtMatmulAlgoGetHeuristic(Handle *h, const Product *p, const Layout *a, const Layout *b, const Layout *c, const Layout *d,
                                   const Preference *preference, int wanted, char *results, int *count) {
  *count = 0;
  if (!h || wanted < 1) return refuse(INVALID_VALUE, "no handle, or no room");
  if (int code = check(p, a, b, c, d)) return code;
  for (unsigned alignment : preference->alignment) if (alignment != 16) return refuse(NOT_SUPPORTED, "an alignment that duo does not keep");
  if (preference->workspace < WORKSPACE) return NOT_SUPPORTED;
  memset(results, 0, 96);
  memcpy(results, "algo", 4);
  memcpy(results + 64, &WORKSPACE, 8);
  *count = 1;
  return OK;
}

static float widen(int type, const void *at, int64_t i, bool tf32) {
  if (type == 2) { _Float16 h; memcpy(&h, (const char *)at + 2 * i, 2); return (float)h; }
  uint32_t bits = 0;
  if (type == 14) { uint16_t h; memcpy(&h, (const char *)at + 2 * i, 2); bits = (uint32_t)h << 16; }
  else memcpy(&bits, (const char *)at + 4 * i, 4);
  if (tf32 && (bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & 0xffffe000u;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static void narrow(int type, void *at, int64_t i, float x) {
  if (type == 2) { _Float16 h = (_Float16)x; memcpy((char *)at + 2 * i, &h, 2); return; }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (type == 0) { memcpy((char *)at + 4 * i, &bits, 4); return; }
  uint16_t h = (uint16_t)(x != x ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  memcpy((char *)at + 2 * i, &h, 2);
}
static double logistic(double x) { return 0.5 * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static float gelu(float x) { return (float)(x * logistic(x)); }
static float gelu_slope(float x) {
  const double h = 1e-4, y = x;
  return (float)(((y + h) * logistic(y + h) - (y - h) * logistic(y - h)) / (2 * h));
}

struct Job { Product p; Layout a, b, c, d; const char *from_a, *from_b, *from_c; char *to; float alpha, beta; char *workspace; };
static void run(void *given) {  // kept: a graph may run it again
  const Job &j = *(const Job *)given;
  memset(j.workspace, 0xab, WORKSPACE);
  auto bytes = [](const Layout &l) { return l.type == 0 ? 4 : 2; };
  const int64_t m = (int64_t)j.d.rows, n = (int64_t)j.d.columns, k = (int64_t)(j.p.trans_a ? j.a.rows : j.a.columns);
  const bool tf32 = j.p.compute == 77;
  auto at_a = [&](const char *a, int64_t row, int64_t i) { return widen(j.a.type, a, j.p.trans_a ? i + row * j.a.ld : row + i * j.a.ld, tf32); };
  auto at_b = [&](const char *b, int64_t i, int64_t col) { return widen(j.b.type, b, j.p.trans_b ? col + i * j.b.ld : i + col * j.b.ld, tf32); };
  std::vector<float> sums(j.p.epilogue & 512 ? n : m);
  for (int g = 0; g < j.d.batch; g++) {
    const char *a = j.from_a + g * j.a.stride * bytes(j.a), *b = j.from_b + g * j.b.stride * bytes(j.b), *c = j.from_c + g * j.c.stride * bytes(j.c);
    char *d = j.to + g * j.d.stride * bytes(j.d);
    const char *aux = (const char *)j.p.aux + g * j.p.aux_stride * bytes(j.d);
    for (int64_t col = 0; col < n; col++)
      for (int64_t row = 0; row < m; row++) {
        float sum = 0;
        for (int64_t i = 0; i < k; i++)
          sum += at_a(a, row, i) * at_b(b, i, col);
        float x = j.alpha * sum;
        if (j.beta != 0) x += j.beta * widen(j.c.type, c, row + col * j.c.ld, false);
        if (j.p.epilogue & 4) x += widen(j.d.type, (const void *)j.p.bias, row, false);
        unsigned char *const byte = (unsigned char *)j.p.aux + (row + col * j.p.aux_ld) / 8, bit = 1u << row % 8;
        if ((j.p.epilogue & 130) == 130) *byte = x > 0 ? *byte | bit : *byte & ~bit;
        if (j.p.epilogue & 8) x = *byte & bit ? x : 0;
        else if (j.p.epilogue & 64) x *= gelu_slope(widen(j.d.type, aux, row + col * j.p.aux_ld, false));
        else if (j.p.epilogue & 32) x = gelu(x);
        else if (j.p.epilogue & 2) x = x > 0 ? x : 0;
        narrow(j.d.type, d, row + col * j.d.ld, x);
        if (j.p.epilogue & 16) sums[row] += widen(j.d.type, d, row + col * j.d.ld, false);
      }
    for (int64_t i = 0; i < k; i++) {
      if (j.p.epilogue & 256) for (int64_t row = 0; row < m; row++) sums[row] += at_a(a, row, i);
      if (j.p.epilogue & 512) for (int64_t col = 0; col < n; col++) sums[col] += at_b(b, i, col);
    }
    if (j.p.epilogue & (16 | 256 | 512))
      for (size_t i = 0; i < sums.size(); i++) narrow(j.d.type, (void *)j.p.bias, i, sums[i]);
  }
}
API cublasLtMatmul(Handle *h, const Product *p, const float *alpha, const void *a, const Layout *la, const void *b, const Layout *lb, const float *beta,
                   const void *c, const Layout *lc, void *d, const Layout *ld, const char *algo, void *workspace, size_t nbytes, void *stream) {
  if (!h || memcmp(algo, "algo", 4)) return refuse(INVALID_VALUE, "no handle, or no algorithm of the heuristics");
  if (int code = check(p, la, lb, lc, ld)) return code;
  for (uint64_t at : {(uint64_t)a, (uint64_t)b, (uint64_t)c, (uint64_t)d, p->epilogue & VECTOR ? p->bias : 0, p->epilogue & 128 ? p->aux : 0})
    if (at % 16) return refuse(INVALID_VALUE, "a misaligned operand");
  if (nbytes < WORKSPACE || !workspace) return refuse(INVALID_VALUE, "too little workspace");
  typedef int (*Launch)(void *, void (*)(void *), void *);
  static Launch launch = (Launch)dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), "cuLaunchHostFunc");
  if (!launch) return refuse(NOT_INITIALIZED, "no emulated libcuda.so.1 is loaded");
  return launch(stream, run, new Job{*p, *la, *lb, *lc, *ld, (const char *)a, (const char *)b, (const char *)c, (char *)d, *alpha, *beta, (char *)workspace});
}
