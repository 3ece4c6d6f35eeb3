// Sorting: keys of elements, tiles sorted in shared memory by a bitonic network, and runs merged two by two until one is left.
// A record is a key and its position, all distinct, so any correct algorithm gives the one stable order.
struct SortWord { unsigned long long word; };       // a 32-bit key above the position
struct SortPair { unsigned long long key, place; };  // a 64-bit key and the position
DUO_FN bool duo_before(SortWord a, SortWord b) { return a.word < b.word; }
DUO_FN bool duo_before(SortPair a, SortPair b) { return a.key < b.key || (a.key == b.key && a.place < b.place); }
DUO_FN long long duo_place(SortWord a) { return (long long)(a.word & 0xffffffffull); }
DUO_FN long long duo_place(SortPair a) { return (long long)a.place; }
DUO_FN void duo_record(SortWord &r, unsigned key, long long place) { r.word = (unsigned long long)key << 32 | (unsigned long long)place; }
DUO_FN void duo_record(SortPair &r, unsigned long long key, long long place) { r.key = key; r.place = (unsigned long long)place; }
DUO_FN void duo_last(SortWord &r) { r.word = ~0ull; }
DUO_FN void duo_last(SortPair &r) { r.key = r.place = ~0ull; }

// Bits of a float as an unsigned number in its order: zeros of either sign equal, every NaN the greatest.
DUO_FN unsigned duo_float_key(unsigned bits, unsigned sign, unsigned infinity) {
  unsigned magnitude = bits & (sign - 1u);
  if (magnitude > infinity) return sign | (sign - 1u);
  if (magnitude == 0u) return sign;
  return (bits & sign) ? ~bits & (sign | (sign - 1u)) : bits | sign;
}
DUO_FN unsigned duo_key_f32(float x) { return duo_float_key(__float_as_uint(x), 0x80000000u, 0x7f800000u); }
DUO_FN unsigned duo_key_f16(unsigned short x) { return duo_float_key(x, 0x8000u, 0x7c00u); }
DUO_FN unsigned duo_key_bf16(unsigned short x) { return duo_float_key(x, 0x8000u, 0x7f80u); }
DUO_FN unsigned long long duo_key_f64(double x) {
  unsigned long long bits = (unsigned long long)__double_as_longlong(x), sign = 1ull << 63, magnitude = bits & (sign - 1ull);
  if (magnitude > 0x7ff0000000000000ull) return ~0ull;
  if (magnitude == 0ull) return sign;
  return (bits & sign) ? ~bits : bits | sign;
}
DUO_FN unsigned duo_key_bool(bool x) { return x ? 1u : 0u; }
DUO_FN unsigned duo_key_u8(unsigned char x) { return x; }
DUO_FN unsigned duo_key_i8(signed char x) { return (unsigned)x ^ 0x80000000u; }
DUO_FN unsigned duo_key_i16(short x) { return (unsigned)x ^ 0x80000000u; }
DUO_FN unsigned duo_key_i32(int x) { return (unsigned)x ^ 0x80000000u; }
DUO_FN unsigned long long duo_key_i64(long long x) { return (unsigned long long)x ^ (1ull << 63); }

// Sorts the N records, a power of two, that the block has put in shared memory.
template <class R, int N> DUO_FN void duo_sort_tile(R *s) {
  for (int size = 2; size <= N; size <<= 1) {
    for (int stride = size >> 1; stride > 0; stride >>= 1) {
      __syncthreads();
      for (int t = threadIdx.x; t < N / 2; t += blockDim.x) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const R a = s[i], b = s[j];
        if (duo_before(b, a) == ((i & size) == 0)) { s[i] = b; s[j] = a; }
      }
    }
  }
  __syncthreads();
}

// Of a row of n records in sorted runs of `width`, the results [begin, begin + many) of merging them two by two. Of each run no more than
// `count` records are there, nor are more made.
template <class R> static __device__ __noinline__ void duo_merge(const R *from, R *to, long long n, long long count, long long width,
                                                                  long long begin, int many) {
  const long long start = begin / (2 * width) * (2 * width), k = begin - start;
  long long left = n - start < width ? n - start : width, right = n - start - width < width ? n - start - width : width;
  left = left < count ? left : count;
  right = right < 0 ? 0 : right < count ? right : count;
  const long long total = left + right < count ? left + right : count;
  if (k >= total) return;
  const R *a = from + start, *b = from + start + width;
  long long low = k > right ? k - right : 0, high = k < left ? k : left;  // how many of the first k are of the left run
  while (low < high) {
    const long long middle = (low + high) / 2;
    if (duo_before(a[middle], b[k - 1 - middle])) low = middle + 1; else high = middle;
  }
  long long i = low, j = k - low;
  for (int m = 0; m < many && k + m < total; ++m) {
    const bool first = j >= right || (i < left && duo_before(a[i], b[j]));
    to[begin + m] = first ? a[i++] : b[j++];
  }
}
