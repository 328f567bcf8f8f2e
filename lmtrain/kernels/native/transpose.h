// Transposes a bf16 matrix in memory: torch multiplies contiguous bf16 operands faster.

#ifdef BF16
// Transposes a block of up to 32 rows and 32 columns.
static inline void transpose_block(const bf16* from, int64_t from_stride, bf16* to,
                                   int64_t to_stride, int rows, int columns) {
  const __mmask32 column_mask = columns == 32 ? ~0u : (1u << columns) - 1;
  const __mmask32 row_mask = rows == 32 ? ~0u : (1u << rows) - 1;
  // words[half][pair][column]: the elements of two adjacent rows in one column.
  alignas(64) int32_t words[2][16][16] = {};
  alignas(64) static const uint16_t interleave[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  for (int row = 0; row < rows; row += 2) {
    __m512i even = _mm512_maskz_loadu_epi16(column_mask, from + row * from_stride);
    __m512i odd = row + 1 < rows
                      ? _mm512_maskz_loadu_epi16(column_mask, from + (row + 1) * from_stride)
                      : _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half)
      _mm512_store_si512(words[half][row / 2],
                         _mm512_permutex2var_epi16(
                             even, _mm512_load_si512(interleave[half]), odd));
  }
  const __m512i stride = _mm512_mullo_epi32(
      _mm512_set1_epi32(16),
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (int column = 0; column < columns; ++column) {
    __m512i pairs = _mm512_i32gather_epi32(stride, &words[column / 16][0][column % 16], 4);
    _mm512_mask_storeu_epi16(to + column * to_stride, row_mask, pairs);
  }
}

// Transposes the columns of thread `id`.
static void transpose(const TransposeArguments& a, int id, int threads) {
  int64_t blocks = (a.columns + 31) / 32;
  for (int64_t block = blocks * id / threads; block < blocks * (id + 1) / threads; ++block)
    for (int64_t row = 0; row < a.rows; row += 32)
      transpose_block((const bf16*)a.source + row * a.columns + block * 32, a.columns,
                      (bf16*)a.destination + block * 32 * a.rows + row, a.rows,
                      (int)std::min<int64_t>(32, a.rows - row),
                      (int)std::min<int64_t>(32, a.columns - block * 32));
}
#endif
