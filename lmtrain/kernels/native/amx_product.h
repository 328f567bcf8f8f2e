// out = left · right in bf16, summed in fp32, of matrices that are contiguous in one direction.
// Included for AMX only, inside its namespace; see native.cpp.
//
// Columns of `right`, a piece of the depth deep, are packed as the weights of a scan are (packed.h),
// so that a block of them stays in the second-level cache. For each strip of rows, tiles of 32 rows
// and 32 columns are summed in tile registers. Meanwhile, the sums of the previous tile are stored
// in `out`. If the depth has several pieces, sums are kept in the workspace from piece to piece.

// Vectors and columns of a tile of `out`, and its rows.
constexpr int TILE_VECTORS = 2, TILE_COLUMNS = TILE_VECTORS * VL;
constexpr int64_t STRIP_ROWS = 32;
// Most columns and depth of a packed block of `right`: 768 KiB, in a second-level cache of 2 MiB.
constexpr int64_t BLOCK_COLUMNS = 768, PIECE_DEPTH = 512;
// Most rows of a block if the depth has several pieces: the sums take 1.5 MiB.
constexpr int64_t BLOCK_ROWS = 512;

static inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// 32 elements in bf16; 0 where the mask is 0.
static inline __m512i load_32(const bf16* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}
static inline __m512i load_32(const float* from, __mmask32 mask) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + 16),
                                      _mm512_maskz_loadu_ps((__mmask16)mask, from));
}

// The columns of two rows side by side: pairs[i] has those of columns 16·i to 16·i + 15.
static inline void interleave_rows(__m512i (&pairs)[2], __m512i even, __m512i odd) {
  alignas(64) static const uint16_t order[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  for (int half = 0; half < 2; ++half)
    pairs[half] = _mm512_permutex2var_epi16(even, _mm512_load_si512(order[half]), odd);
}

// Packs up to TILE_COLUMNS columns of `right`, `depth` deep. Element (k, column) is at
// k * strides[0] + column * strides[1], of which one is 1.
template <class Num>
static void pack_columns(bf16* to, const Num* right, const int64_t (&strides)[2], int64_t columns,
                         int64_t depth) {
  const int64_t padded = round_up(depth, DEPTH_MULTIPLE);
  auto at = [&](int64_t k, int n) {
    return to + packed_offset<bf16>(k, n, TILE_VECTORS, padded);
  };
  if (strides[1] == 1) {
    const __mmask32 mask = first_of_32(columns);
    for (int64_t k = 0; k < padded; k += 2) {
      __m512i pairs[2];
      interleave_rows(pairs, load_32(right + k * strides[0], k < depth ? mask : 0),
                      load_32(right + (k + 1) * strides[0], k + 1 < depth ? mask : 0));
      for (int n = 0; n < TILE_VECTORS; ++n) _mm512_store_si512(at(k, n), pairs[n]);
    }
    return;
  }
  for (int n = 0; n < TILE_VECTORS; ++n)
    for (int64_t k = 0; k < padded; k += 32) {
      const __mmask32 mask = first_of_32(depth - k);
      __m512i words[16];
      for (int lane = 0; lane < 16; ++lane) {
        const int64_t column = n * 16 + lane;
        words[lane] = load_32(right + column * strides[1] + k, column < columns ? mask : 0);
      }
      transpose_words(words);
      for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(at(k + 2 * pair, n), words[pair]);
    }
}

// Copies up to STRIP_ROWS rows of `left` to (row, padded depth). Element (row, k) is at
// row * strides[0] + k * strides[1], of which one is 1.
static void copy_rows(bf16* to, const bf16* left, const int64_t (&strides)[2], int64_t rows,
                      int64_t depth) {
  const int64_t padded = round_up(depth, DEPTH_MULTIPLE);
  for (int64_t k = 0; k < padded; k += 32) {
    if (strides[1] == 1) {
      for (int64_t row = 0; row < rows; ++row)
        _mm512_storeu_si512(to + row * padded + k,
                            load_32(left + row * strides[0] + k, first_of_32(depth - k)));
      continue;
    }
    const __mmask32 mask = first_of_32(rows);
    __m512i words[2][16];  // of 16 rows each: pairs of elements
    for (int pair = 0; pair < 16; ++pair) {
      const int64_t even = k + 2 * pair;
      __m512i pairs[2];
      interleave_rows(pairs, load_32(left + even * strides[1], even < depth ? mask : 0),
                      load_32(left + (even + 1) * strides[1], even + 1 < depth ? mask : 0));
      for (int half = 0; half < 2; ++half) words[half][pair] = pairs[half];
    }
    for (int half = 0; half < 2; ++half) {
      transpose_words(words[half]);
      for (int64_t row = half * 16; row < std::min<int64_t>(rows, half * 16 + 16); ++row)
        _mm512_storeu_si512(to + row * padded + k, words[half][row % 16]);
    }
  }
}

// A tile of `out` whose sums, (row, vector, lane), are complete.
struct FinishedTile {
  const float* sums;
  char* out;
  int64_t stride;  // of `out`, in elements
  int rows = 0, columns;
  bool is_bf16;
  int stored = 0;  // number of rows

  // Stores up to `count` more rows.
  void store_rows(int count) {
    for (int end = std::min(rows, stored + count); stored < end; ++stored)
      for (int n = 0; n < columns; n += VL) {
        const vec v = load(sums + stored * TILE_COLUMNS + n);
        const int64_t index = stored * stride + n;
        const int lanes = std::min(VL, columns - n);
        is_bf16 ? store((bf16*)out + index, v, lanes) : store((float*)out + index, v, lanes);
      }
  }
};

// sums = operand · panel, or if is_sum the sum of both, for up to STRIP_ROWS rows and TILE_COLUMNS
// columns. Meanwhile stores `finished`.
static inline void multiply_panel(float* sums, const TileRows& rows, const bf16* operand,
                                  int64_t stride, const bf16* panel, int64_t depth, bool is_sum,
                                  FinishedTile& finished) {
  const int64_t second = rows.begin(rows.tiles - 1);
  float* const out[2] = {sums, sums + second * TILE_COLUMNS};
  const bf16* const operands[2] = {operand, operand + second * stride};
  const int steps = (int)std::max<int64_t>(1, depth / DEPTH_MULTIPLE);
  const int count = (finished.rows + steps - 1) / steps;
  auto meanwhile = [&] { finished.store_rows(count); };
  if (rows.tiles == 2)
    multiply_tiles<2, 2>(out, TILE_COLUMNS, operands, stride, panel, depth, is_sum, meanwhile);
  else
    multiply_tiles<1, 2>(out, TILE_COLUMNS, operands, stride, panel, depth, is_sum, meanwhile);
  finished.store_rows(finished.rows);
}

static int64_t bf16_product_workspace() {
  return (BLOCK_COLUMNS + STRIP_ROWS) * PIECE_DEPTH * 2 +
         (BLOCK_ROWS * BLOCK_COLUMNS + 2 * STRIP_ROWS * TILE_COLUMNS) * 4;
}

// Computes the part of thread `id`. Right is the type of the elements of `right`.
template <class Right>
static void multiply_part(const ProductArguments& a, const ProductPart& part, char* workspace) {
  float* accumulators = (float*)workspace;
  float* tile_sums = accumulators + BLOCK_ROWS * BLOCK_COLUMNS;  // of two tiles in turn
  bf16* packed = (bf16*)(tile_sums + 2 * STRIP_ROWS * TILE_COLUMNS);
  bf16* strip = packed + BLOCK_COLUMNS * PIECE_DEPTH;
  TileRows tile_rows(1);
  tile_rows.configure();
  FinishedTile finished;
  int turn = 0;
  const int64_t pieces = std::max<int64_t>(1, (a.depth + PIECE_DEPTH - 1) / PIECE_DEPTH);
  const int64_t piece_depth = round_up((a.depth + pieces - 1) / pieces, DEPTH_MULTIPLE);
  const int64_t block_rows = pieces == 1 ? part.last_row : BLOCK_ROWS;
  for (int64_t column = part.first_column; column < part.last_column; column += BLOCK_COLUMNS) {
    const int64_t columns = std::min(BLOCK_COLUMNS, part.last_column - column);
    for (int64_t row = part.first_row; row < part.last_row; row += block_rows) {
      const int64_t rows = std::min(block_rows, part.last_row - row);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t k = piece * piece_depth;
        const int64_t depth = std::max<int64_t>(0, std::min(piece_depth, a.depth - k));
        const int64_t padded = round_up(depth, DEPTH_MULTIPLE);
        for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
          pack_columns(packed + j * padded,
                       (const Right*)a.right + k * a.right_strides[0] +
                           (column + j) * a.right_strides[1],
                       a.right_strides, std::min<int64_t>(TILE_COLUMNS, columns - j), depth);
        for (int64_t i = 0; i < rows; i += STRIP_ROWS) {
          const int64_t height = std::min(STRIP_ROWS, rows - i);
          if (height != tile_rows.rows) {
            tile_rows = TileRows(height);
            tile_rows.configure();
          }
          const bf16* operand =
              (const bf16*)a.left + (row + i) * a.left_strides[0] + k * a.left_strides[1];
          int64_t stride = a.left_strides[0];
          // Tiles are loaded from rows in place if these are contiguous and need no padding.
          if (a.left_strides[1] != 1 || depth != padded) {
            copy_rows(strip, operand, a.left_strides, height, depth);
            operand = strip;
            stride = padded;
          }
          for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
            float* sums = pieces == 1 ? tile_sums + (turn ^= 1) * STRIP_ROWS * TILE_COLUMNS
                                      : accumulators + i * BLOCK_COLUMNS + j * STRIP_ROWS;
            multiply_panel(sums, tile_rows, operand, stride, packed + j * padded, padded, piece > 0,
                           finished);
            finished.rows = finished.stored = 0;
            if (piece < pieces - 1) continue;
            const int64_t index = (row + i) * a.columns + column + j;
            finished = {sums,
                        (char*)a.out + index * (a.is_out_bf16 ? 2 : 4),
                        a.columns,
                        (int)height,
                        (int)std::min<int64_t>(TILE_COLUMNS, columns - j),
                        a.is_out_bf16 != 0};
          }
        }
      }
      // The next block overwrites the sums.
      finished.store_rows(finished.rows);
    }
  }
  _tile_release();
}

static void bf16_product(const ProductArguments& a, int id, int threads, char* workspace) {
  const ProductPart part(a, STRIP_ROWS, TILE_COLUMNS, id, threads);
  char* own = workspace + id * bf16_product_workspace();
  a.is_right_bf16 ? multiply_part<bf16>(a, part, own) : multiply_part<float>(a, part, own);
}
