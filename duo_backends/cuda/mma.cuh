// What products on tensor cores (`mma.py`) are made of: copies to shared memory that run on their own, tiles there, fragments, mma.sync.
// For compute capability 8.0 and later. Layouts of fragments: PTX manual, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8".

#ifndef DUO_EMU
DUO_FN unsigned duo_shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// BYTES to shared memory without waiting, zeros where `there` is false (nothing is read then).
template <int BYTES> DUO_FN void duo_copy_async(void *to, const void *from, bool there) {
  const int n = there ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(duo_shared_address(to)), "l"(from), "r"(n) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(duo_shared_address(to)), "l"(from), "n"(BYTES), "r"(n) : "memory");
}
// Copies started since the last call are one group; all groups but the last N have arrived, for the thread that started them.
DUO_FN void duo_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DUO_FN void duo_arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DUO_FN void duo_ldmatrix4(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(duo_shared_address(row)));
}
DUO_FN void duo_ldmatrix4_trans(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(duo_shared_address(row)));
}

#define DUO_MMA(name, shape)                                                                                             \
  DUO_FN void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {                                      \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                    \
  }
DUO_MMA(duo_mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
DUO_MMA(duo_mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
DUO_MMA(duo_mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")

DUO_FN unsigned duo_to_tf32(unsigned x) { unsigned y; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x))); return y; }
#endif

// Copies of fewer bytes than a copy that runs on its own has.
DUO_FN void duo_copy_now(unsigned short *to, const unsigned short *from, bool there) { *to = there ? *from : (unsigned short)0; }

template <int N> DUO_FN void duo_round_tf32(unsigned (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) r[i] = duo_to_tf32(r[i]);
}

// ------------------------------------------------------------------------------------------------------------------ tiles
// A tile is rows of PITCH bytes. Their 16-byte units change places from row to row, so that what a warp reads at once lies in different banks.
// Where a byte of a row lies: for ldmatrix, eight rows of one unit;
template <int PITCH> DUO_FN int duo_unit(int row, int byte) {
  constexpr int UNITS = PITCH / 16, ROWS = UNITS < 8 ? 8 / UNITS : 1, MASK = (UNITS < 8 ? UNITS : 8) - 1;
  return row * PITCH + (byte ^ ((row / ROWS & MASK) << 4));
}
// for single words, four rows of eight neighbours.
template <int PITCH> DUO_FN int duo_word(int row, int byte) {
  return row * PITCH + (byte ^ ((PITCH >= 128 ? row & 3 : row / 2 & 1) << 5));
}

// Fragments of one step, 32 bytes of k: of A, 16 rows from `first` on; of B, two of 8 columns. `lines`: the tile has a line for each row (of A) or
// column (of B); `across`: for each k, 16-bit elements; `words`: for each k, 32-bit elements.
template <int PITCH> DUO_FN void duo_a_lines(unsigned (&a)[4], const unsigned char *tile, int first, int step) {
  const int lane = threadIdx.x % 32;
  duo_ldmatrix4(a, tile + first * PITCH + duo_unit<PITCH>(lane % 16, step * 32 + lane / 16 * 16));
}
template <int PITCH> DUO_FN void duo_b_lines(unsigned (&b0)[2], unsigned (&b1)[2], const unsigned char *tile, int first, int step) {
  const int lane = threadIdx.x % 32;
  unsigned r[4];
  duo_ldmatrix4(r, tile + first * PITCH + duo_unit<PITCH>(lane / 16 * 8 + lane % 8, step * 32 + lane / 8 % 2 * 16));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
template <int PITCH> DUO_FN void duo_a_across(unsigned (&a)[4], const unsigned char *tile, int first, int step) {
  const int lane = threadIdx.x % 32;
  duo_ldmatrix4_trans(a, tile + duo_unit<PITCH>(step * 16 + lane / 16 * 8 + lane % 8, (first + lane / 8 % 2 * 8) * 2));
}
template <int PITCH> DUO_FN void duo_b_across(unsigned (&b0)[2], unsigned (&b1)[2], const unsigned char *tile, int first, int step) {
  const int lane = threadIdx.x % 32;
  unsigned r[4];
  duo_ldmatrix4_trans(r, tile + duo_unit<PITCH>(step * 16 + lane % 16, (first + lane / 16 * 8) * 2));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
template <int PITCH> DUO_FN void duo_a_words(unsigned (&a)[4], const unsigned char *tile, int first, int step) {
  const int lane = threadIdx.x % 32, row = first + lane / 4, k = step * 8 + lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = *(const unsigned *)(tile + duo_word<PITCH>(k + i / 2 * 4, (row + i % 2 * 8) * 4));
}
template <int PITCH> DUO_FN void duo_b_words(unsigned (&b0)[2], unsigned (&b1)[2], const unsigned char *tile, int first, int step) {
  const int lane = threadIdx.x % 32, column = first + lane / 4, k = step * 8 + lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    b0[i] = *(const unsigned *)(tile + duo_word<PITCH>(k + i * 4, column * 4));
    b1[i] = *(const unsigned *)(tile + duo_word<PITCH>(k + i * 4, (column + 8) * 4));
  }
}

// The number of a block in a grid of tiles, rows before columns in strips of eight rows: blocks that run together share operands in the cache.
template <class I> DUO_FN void duo_place(I number, I tiles_m, I tiles_n, I &m, I &n) {
  const I strip = number / (8 * tiles_n), within = number - strip * (8 * tiles_n), first = strip * 8;
  const I height = tiles_m - first < 8 ? tiles_m - first : 8;
  n = within / height, m = first + (within - n * height);
}
