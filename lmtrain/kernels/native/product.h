// out = left · right in fp32, of matrices with any strides: packed panels, register tiles; for few
// rows, inner products.
// Included once for each instruction set with fp32 kernels, inside its namespace; see native.cpp.
//
// As in Goto & van de Geijn 2008: a panel of `right`, DEPTH deep, is packed by vectors of NR
// columns; a block of `left`, ROWS high, by MR rows, so that it stays in the second-level cache; and
// a tile of MR rows and NR columns of `out` is summed in registers from one vector of each. An
// element of `out` is a sum over k in pieces of the same depth for any number of threads.

#if VL == 16
constexpr int MR = 12, NR_VECTORS = 2;
#elif VL == 8
constexpr int MR = 6, NR_VECTORS = 2;
#else
constexpr int MR = 4, NR_VECTORS = 2;
#endif
constexpr int NR = NR_VECTORS * VL;
// Up to this number of rows, inner products are faster than packing. Chosen by measurement.
constexpr int64_t MAX_UNPACKED_ROWS = VL == 16 ? 80 : VL == 8 ? 20 : 32;
// Rows of a tile of inner products, as many as there are registers for. A block of INNER_COLUMNS
// columns of `right` stays in the second-level cache while blocks of rows, of about INNER_ROW_BYTES,
// use it from the first-level one. Chosen by measurement.
constexpr int MAX_INNER_ROWS = VL == 16 ? 6 : 3;
constexpr int64_t INNER_COLUMNS = VL == 16 ? 64 : 32, INNER_ROW_BYTES = 20 << 10;
// Panels of `right` of DEPTH * NR floats fit into the first-level cache, blocks of `left` into the
// second-level one. Chosen by measurement.
constexpr int64_t DEPTH = VL == 16 ? 256 : 384, ROWS = 16 * MR, COLUMNS = 64 * NR;

// Floats of a cache line.
constexpr int64_t LINE = 64 / sizeof(float);

// Packs WIDTH lines that are contiguous in k: to (k, line). Reads whole cache lines: those of
// matrices whose width is a power of two do not stay in the first-level cache.
template <int WIDTH>
static void pack_contiguous(float* to, const float* lines, int64_t line_stride, int64_t depth) {
  int64_t k = 0;
#ifdef IS_X86
  for (; k + LINE <= depth; k += LINE) {
    int line = 0;
    for (; line + 4 <= WIDTH; line += 4)
      for (int64_t j = k; j < k + LINE; j += 4) {
        __m128 block[4];
        for (int i = 0; i < 4; ++i) block[i] = _mm_loadu_ps(lines + (line + i) * line_stride + j);
        _MM_TRANSPOSE4_PS(block[0], block[1], block[2], block[3]);
        for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (j + i) * WIDTH + line, block[i]);
      }
    for (; line < WIDTH; ++line)
      for (int64_t j = k; j < k + LINE; ++j) to[j * WIDTH + line] = lines[line * line_stride + j];
  }
#endif
  for (; k < depth; ++k)
    for (int line = 0; line < WIDTH; ++line) to[k * WIDTH + line] = lines[line * line_stride + k];
}

// Packs `count` lines of `from`, WIDTH at a time: to (line / WIDTH, k, line % WIDTH), padded
// with 0. Element (line, k) is at line * line_stride + k * k_stride.
template <int WIDTH>
static void pack(float* to, const float* from, int64_t line_stride, int64_t k_stride,
                 int64_t count, int64_t depth) {
  for (int64_t line = 0; line < count; line += WIDTH, to += WIDTH * depth) {
    const float* lines = from + line * line_stride;
    int n = (int)std::min<int64_t>(WIDTH, count - line);
    if (n < WIDTH) std::fill(to, to + WIDTH * depth, 0.0f);
    if (line_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        if (n == WIDTH)
          std::memcpy(to + k * WIDTH, lines + k * k_stride, WIDTH * sizeof(float));
        else
          std::memcpy(to + k * WIDTH, lines + k * k_stride, n * sizeof(float));
    } else if (k_stride == 1 && n == WIDTH) {
      pack_contiguous<WIDTH>(to, lines, line_stride, depth);
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int i = 0; i < n; ++i) to[k * WIDTH + i] = lines[i * line_stride + k * k_stride];
    }
  }
}

// Lines for the second-level cache: at every LINE-th k `count` of them, `stride` floats apart, and LINE
// floats further than before.
struct Prefetch {
  const float* next;
  int64_t count, stride;
};

// What tile `tile` of `tiles` prefetches of columns that are contiguous in k and packed after these
// tiles: packing reads too few of each at a time for the processor to foresee.
static inline Prefetch columns_of_tile(const float* right, int64_t stride, int64_t columns,
                                       int64_t tile, int64_t tiles) {
  const int64_t first = columns * tile / tiles;
  return {right + first * stride, columns * (tile + 1) / tiles - first, stride};
}

// sums = left panel (depth, MR) · right panel (depth, NR). Prefetches the tile of `out`, which is
// read and written next, and `ahead`.
static inline void multiply_panels(vec (&sums)[MR][NR_VECTORS], const float* out,
                                   int64_t out_stride, const float* left, const float* right,
                                   int64_t depth, Prefetch ahead) {
  vec acc[MR][NR_VECTORS] = {};
  for (int r = 0; r < MR; ++r) {
    __builtin_prefetch(out + r * out_stride, 1);
    __builtin_prefetch(out + r * out_stride + NR - 1, 1);
  }
  auto add = [&](int64_t k) __attribute__((always_inline)) {
    vec w[NR_VECTORS];
#pragma GCC unroll 2
    for (int n = 0; n < NR_VECTORS; ++n) w[n] = load(right + k * NR + n * VL);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      vec x = splat(left[k * MR + r]);
#pragma GCC unroll 2
      for (int n = 0; n < NR_VECTORS; ++n) acc[r][n] += x * w[n];
    }
  };
  // Not with vectors of 4 floats: the unrolled loop would need more registers than there are.
  if constexpr (VL > 4)
    for (; ahead.count && depth >= LINE; depth -= LINE, left += LINE * MR, right += LINE * NR) {
      for (int64_t i = 0; i < ahead.count; ++i)
        __builtin_prefetch(ahead.next + i * ahead.stride, 0, 2);
      ahead.next += LINE;
#pragma GCC unroll 16
      for (int64_t k = 0; k < LINE; ++k) add(k);
    }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) add(k);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < NR_VECTORS; ++n) sums[r][n] = acc[r][n];
}

// A tile of `out`, = or += the product of two panels.
static inline void multiply_panel_tile(float* out, int64_t out_stride, int rows, int columns,
                                       bool is_first, const float* left, const float* right,
                                       int64_t depth, Prefetch ahead) {
  vec sums[MR][NR_VECTORS];
  multiply_panels(sums, out, out_stride, left, right, depth, ahead);
  if (rows == MR && columns == NR) {
    for (int r = 0; r < MR; ++r)
      for (int n = 0; n < NR_VECTORS; ++n) {
        float* to = out + r * out_stride + n * VL;
        store(to, is_first ? sums[r][n] : load(to) + sums[r][n], VL);
      }
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n * VL < columns; ++n) {
      float* to = out + r * out_stride + n * VL;
      int count = std::min(VL, columns - n * VL);
      store(to, is_first ? sums[r][n] : load(to, count) + sums[r][n], count);
    }
}

// A part of the rows and columns of `out`. `workspace` has product_workspace() floats.
static void multiply_part(const ProductArguments& a, int64_t first_row, int64_t last_row,
                          int64_t first_column, int64_t last_column, float* workspace) {
  float *lefts = workspace, *rights = workspace + ROWS * DEPTH;
  const int64_t pieces = std::max<int64_t>(1, (a.depth + DEPTH - 1) / DEPTH);
  const bool has_one_block = last_row - first_row <= ROWS;  // which uses a panel once
  for (int64_t column = first_column; column < last_column; column += COLUMNS) {
    const int64_t columns = std::min(COLUMNS, last_column - column);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t k = a.depth * piece / pieces, depth = a.depth * (piece + 1) / pieces - k;
      const float* right = (const float*)a.right + k * a.right_strides[0] + column * a.right_strides[1];
      for (int64_t row = first_row; row < last_row; row += ROWS) {
        const int64_t rows = std::min(ROWS, last_row - row);
        pack<MR>(lefts, (const float*)a.left + row * a.left_strides[0] + k * a.left_strides[1],
                 a.left_strides[0], a.left_strides[1], rows, depth);
        for (int64_t j = 0; j < columns; j += NR) {
          // Packed just before its first use, so that it is in the first-level cache.
          float* panel = rights + (has_one_block ? 0 : j * depth);
          if (row == first_row)
            pack<NR>(panel, right + j * a.right_strides[1], a.right_strides[1],
                     a.right_strides[0], std::min<int64_t>(NR, columns - j), depth);
          const int64_t next = std::min<int64_t>(NR, columns - j - NR);
          const bool is_prefetching = row == first_row && next > 0 && a.right_strides[0] == 1;
          for (int64_t i = 0; i < rows; i += MR) {
            Prefetch ahead = {};
            if (is_prefetching)
              ahead = columns_of_tile(right + (j + NR) * a.right_strides[1], a.right_strides[1],
                                      next, i / MR, (rows + MR - 1) / MR);
            multiply_panel_tile((float*)a.out + (row + i) * a.columns + column + j, a.columns,
                                (int)std::min<int64_t>(MR, rows - i),
                                (int)std::min<int64_t>(NR, columns - j), piece == 0,
                                lefts + i * depth, panel, depth, ahead);
          }
        }
      }
    }
  }
}

// x * y + z, rounded once where the instruction set can. The compiler alone may round some of the
// elements twice.
static inline vec multiply_add(vec x, vec y, vec z) {
#if VL == 16
  return (vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif VL == 8
  return (vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}

// The sum of the lanes of each of four vectors.
static inline void sums_of_lanes(float (&sums)[4], const vec (&v)[4]) {
#if VL >= 8
#if VL == 16
  __m256 halves[4];
  for (int i = 0; i < 4; ++i)
    halves[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]),
                              _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
  const __m256 halves[4] = {(__m256)v[0], (__m256)v[1], (__m256)v[2], (__m256)v[3]};
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]),
                                      _mm256_hadd_ps(halves[2], halves[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < VL; ++lane) sums[i] += v[i][lane];
  }
#endif
}

// Inner products of M rows of `left` and four columns of `right`; if fewer are left, the last one is
// repeated. Prefetches the line `ahead`, of the same depth.
template <int M>
static void multiply_inner(const ProductArguments& a, int64_t row, int64_t column,
                           const float* ahead) {
  const float *left = (const float*)a.left + row * a.left_strides[0], *right[4];
  for (int n = 0; n < 4; ++n)
    right[n] = (const float*)a.right + std::min(column + n, a.columns - 1) * a.right_strides[1];
  vec acc[M][4];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) acc[m][n] = vec{};
  auto add = [&](int64_t k, auto load_at) {
    __builtin_prefetch(ahead + k, 0, 2);
    vec x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x[m] = load_at(left + m * a.left_strides[0] + k);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      vec w = load_at(right[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = multiply_add(x[m], w, acc[m][n]);
    }
  };
  int64_t k = 0;
  for (; k + VL <= a.depth; k += VL) add(k, [](const float* p) { return load(p); });
  const int rest = (int)(a.depth - k);
  if (rest) add(k, [rest](const float* p) { return load(p, rest); });
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float sums[4];
    sums_of_lanes(sums, acc[m]);
    float* out = (float*)a.out + (row + m) * a.columns + column;
    for (int n = 0; n < std::min<int64_t>(4, a.columns - column); ++n) out[n] = sums[n];
  }
}

// The functions for 1 to MAX_INNER_ROWS rows.
template <int... M> static auto select_inner(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr void (*functions[])(const ProductArguments&, int64_t, int64_t, const float*) = {
      multiply_inner<M + 1>...};
  return functions[rows - 1];
}

// All rows of a part of the columns, without packing: for few rows, and lines that are contiguous.
// Each element is the same whatever the number of rows.
static void multiply_few_rows(const ProductArguments& a, int64_t first_column,
                              int64_t last_column) {
  const int64_t tiles = (a.rows + MAX_INNER_ROWS - 1) / MAX_INNER_ROWS;
  const int64_t tile_bytes = std::max<int64_t>(1, MAX_INNER_ROWS * a.depth * sizeof(float));
  const int64_t tiles_of_block = std::max<int64_t>(1, INNER_ROW_BYTES / tile_bytes);
  for (int64_t begin = first_column; begin < last_column; begin += INNER_COLUMNS)
    for (int64_t block = 0; block < tiles; block += tiles_of_block)
      for (int64_t column = begin; column < std::min(begin + INNER_COLUMNS, last_column);
           column += 4)
        for (int64_t tile = block; tile < std::min(block + tiles_of_block, tiles); ++tile) {
          const int64_t row = a.rows * tile / tiles, height = a.rows * (tile + 1) / tiles - row;
          // Each of the first four tiles prefetches a column of the next block; later ones repeat
          // the last of them.
          const int64_t next = std::min(column + INNER_COLUMNS + std::min<int64_t>(tile, 3),
                                        a.columns - 1);
          const float* ahead = (const float*)a.right + next * a.right_strides[1];
          select_inner(height, std::make_integer_sequence<int, MAX_INNER_ROWS>{})(a, row, column,
                                                                                  ahead);
        }
}

static int64_t product_workspace() { return (ROWS + COLUMNS) * DEPTH * (int64_t)sizeof(float); }

// Whether a product is computed by inner products, without packing.
static bool is_unpacked(const ProductArguments& a) {
  return a.rows <= MAX_UNPACKED_ROWS && a.left_strides[1] == 1 && a.right_strides[0] == 1;
}

// Computes the part of thread `id`.
static void product(const ProductArguments& a, int id, int threads, char* workspace) {
  if (is_unpacked(a)) {
    auto bound = [&](int64_t part) {
      return std::min(a.columns, round_up(a.columns * part / threads, 4));
    };
    multiply_few_rows(a, bound(id), bound(id + 1));
    return;
  }
  const ProductPart part(a, MR, NR, id, threads);
  multiply_part(a, part.first_row, part.last_row, part.first_column, part.last_column,
                (float*)(workspace + id * product_workspace()));
}

// Independent multiply-adds in registers, the highest rate of this instruction set. Returns the
// number of FLOP.
static int64_t multiply_adds(int64_t rounds, float* result) {
  constexpr int N = VL == 16 ? 24 : 12;
  vec sums[N];
  for (int i = 0; i < N; ++i) sums[i] = splat((float)i);
  vec factor = splat(*result), addend = splat(1e-6f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < N; ++i) sums[i] = sums[i] * factor + addend;
  }
  for (int i = 1; i < N; ++i) sums[0] += sums[i];
  *result = sums[0][0];
  return rounds * N * VL * 2;
}
