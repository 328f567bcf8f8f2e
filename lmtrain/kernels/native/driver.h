// The loop over time of all cells: packed weights, register tiles, one barrier per phase of a step.
// Included once for each instruction set, inside its namespace; see native.cpp.
//
// T steps, B rows, H hidden units, G gates. VL floats per vector; a block is VL hidden units with
// all their gates. Each thread owns blocks, for all rows or for the rows of its group of threads.
// The recurrent weights are packed once per call; those of a thread stay in its L2 cache over all
// steps. A tile is up to MAX_TILE_ROWS rows of one block (forward) or of up to four blocks
// (backward). Its sums stay in registers until the cell has computed activations and state; with
// AMX they pass from tile registers through a small buffer.
//
// Rows of different lengths are sorted by decreasing length (layout.py): a step has the rows that
// have not ended, and its lines begin at `offsets`. All threads then form one group: with groups,
// the threads that have the short rows would be idle.
//
// Cost: T·B·H·H multiply-adds per gate of each recurrent product, forward and again backward.
// Workspace: the packed weights, operands of two steps (2·B·H per product, in the backward also
// 2·B·G·H of dz) and, in the backward, G·H bias sums per group. torch computes the input products
// and the weight gradients.

#if defined(AMX)
constexpr int MAX_TILE_ROWS = 2;  // the sums come from memory
#elif VL == 16
constexpr int MAX_TILE_ROWS = 6;
#else
constexpr int MAX_TILE_ROWS = 3;
#endif

// Consecutive k that packed weights interleave: bf16 dot products take pairs.
template <class Num> struct Pairs { static constexpr int K = 1; };
template <> struct Pairs<bf16> { static constexpr int K = 2; };

// The depth (k) of products is padded to a multiple of DEPTH_MULTIPLE, with weights of 0. Up to
// MAX_TILE_VECTORS vectors of weights are interleaved.
#ifdef AMX
constexpr int64_t DEPTH_MULTIPLE = 32;
constexpr int MAX_TILE_VECTORS = 2;
#else
constexpr int64_t DEPTH_MULTIPLE = 2;
constexpr int MAX_TILE_VECTORS = 4;
#endif

// Most bytes of weights that a thread reads in each step, and the same per row where that is more;
// a group has at least MIN_GROUP_ROWS rows. Chosen by measurement.
constexpr int64_t CACHED_WEIGHT_BYTES = 5 << 18, CACHED_WEIGHT_BYTES_PER_ROW = 1 << 16,
                  MIN_GROUP_ROWS = 4;

// A matrix packed for products, block by block: for each group of up to MAX_TILE_VECTORS vectors,
// for each k (or pair of k), these vectors. A block has `vectors` of them for each k: the gates of
// the product in the forward, one in the backward.
template <class Num> struct PackedWeights {
  Num* data;
  int64_t depth;  // padded
  int vectors;
  Num* block(int64_t index) const { return data + index * depth * vectors * VL; }
};

// Offset of vector n of `vectors` at k, in the packed weights of one block or of adjacent blocks.
template <class Num>
static inline int64_t packed_offset(int64_t k, int n, int64_t vectors, int64_t depth) {
  int group = n / MAX_TILE_VECTORS * MAX_TILE_VECTORS;
  int64_t width = std::min<int64_t>(MAX_TILE_VECTORS, vectors - group);
  return (group * depth + k * width + (n - group) * Pairs<Num>::K) * VL;
}

// Converts n floats to the type of operands.
template <class Num> static inline void convert(Num* to, const float* from, int64_t n) {
  for (; n > 0; n -= VL, to += VL, from += VL) {
    int count = (int)std::min<int64_t>(VL, n);
    store(to, load(from, count), count);
  }
}

// sums[r][FIRST + n] += operand[r] · weights[n] over `depth`, for N vectors of weights. Accumulates
// in a local copy, which the compiler keeps in registers; with the operands of R rows and one
// vector of weights it takes 16 registers in AVX2.
template <int FIRST, int N, int R, int M>
static inline void multiply(vec (&sums)[R][M], const float* operand, int64_t stride,
                            const float* weights, int64_t depth) {
  vec acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = sums[r][FIRST + n];
  for (int64_t k = 0; k < depth; ++k, weights += N * VL) {
    vec x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = splat(operand[r * stride + k]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      vec w = load(weights + n * VL);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][n] += x[r] * w;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sums[r][FIRST + n] = acc[r][n];
}

#ifdef BF16
template <int FIRST, int N, int R, int M>
static inline void multiply(vec (&sums)[R][M], const bf16* operand, int64_t stride,
                            const bf16* weights, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh w[N];
    for (int n = 0; n < N; ++n)
      w[n] = (__m512bh)_mm512_loadu_si512(weights + (k * N + n * 2) * VL);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, operand + r * stride + k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < N; ++n)
        sums[r][FIRST + n] = (vec)_mm512_dpbf16_ps((__m512)sums[r][FIRST + n], x, w[n]);
    }
  }
}
#endif

#ifdef AMX
// out = operand · weights for M × N tiles of up to 16 rows by 16 units. Tile registers 0 to 3 are
// accumulators, 4 and 5 operands, 6 and 7 weights.
template <int M, int N>
static inline void multiply_tiles(float* const (&out)[2], int64_t out_stride,
                                  const bf16* const (&operand)[2], int64_t stride,
                                  const bf16* weights, int64_t depth) {
  _tile_zero(0);
  if (N == 2) _tile_zero(1);
  if (M == 2) _tile_zero(2);
  if (M == 2 && N == 2) _tile_zero(3);
  for (int64_t k = 0; k < depth; k += DEPTH_MULTIPLE) {
    _tile_loadd(4, operand[0] + k, stride * 2);
    if (M == 2) _tile_loadd(5, operand[1] + k, stride * 2);
    _tile_loadd(6, weights + k * N * VL, N * 64);
    _tile_dpbf16ps(0, 4, 6);
    if (M == 2) _tile_dpbf16ps(2, 5, 6);
    if (N == 2) {
      _tile_loadd(7, weights + (k * N + 2) * VL, N * 64);
      _tile_dpbf16ps(1, 4, 7);
      if (M == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out[0], out_stride * 4);
  if (N == 2) _tile_stored(1, out[0] + VL, out_stride * 4);
  if (M == 2) _tile_stored(2, out[1], out_stride * 4);
  if (M == 2 && N == 2) _tile_stored(3, out[1] + VL, out_stride * 4);
}

// Divides rows into tiles of equal height; the last tile may overlap the one before it.
struct TileRows {
  int64_t tiles, height, rows;
  explicit TileRows(int64_t rows)
      : tiles((rows + 15) / 16), height((rows + tiles - 1) / tiles), rows(rows) {}
  int64_t begin(int64_t tile) const { return std::min(tile * height, rows - height); }
  void configure() const {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = i < 6 ? (uint8_t)height : 16;
    _tile_loadconfig(&config);
  }
};

// sums (row, vector, lane) = operand · weights for all rows and `vectors` vectors of weights.
static inline void multiply_all(float* sums, const TileRows& rows, const bf16* operand,
                                int64_t stride, const bf16* weights, int64_t vectors,
                                int64_t depth) {
  for (int64_t tile = 0; tile < rows.tiles; tile += 2) {
    bool is_pair = tile + 1 < rows.tiles;
    int64_t first = rows.begin(tile), second = is_pair ? rows.begin(tile + 1) : first;
    const bf16* const operands[2] = {operand + first * stride, operand + second * stride};
    for (int64_t n = 0; n < vectors; n += 2) {
      float* const out[2] = {sums + (first * vectors + n) * VL,
                             sums + (second * vectors + n) * VL};
      const bf16* from = weights + n * depth * VL;
      bool is_wide = n + 1 < vectors;
      if (is_pair && is_wide)
        multiply_tiles<2, 2>(out, vectors * VL, operands, stride, from, depth);
      else if (is_pair)
        multiply_tiles<2, 1>(out, vectors * VL, operands, stride, from, depth);
      else if (is_wide)
        multiply_tiles<1, 2>(out, vectors * VL, operands, stride, from, depth);
      else
        multiply_tiles<1, 1>(out, vectors * VL, operands, stride, from, depth);
    }
  }
}
#endif

// A recurrent product: a part of the state times a block of rows of a weight matrix.
struct Product {
  int matrix;          // 0: weight_recurrent, 1: weight_peephole
  int row_gate;        // first row block of the matrix, in gates
  int gate;            // first gate that the product is added to
  int count;           // number of gates
  int state;           // part of the state that is the operand; -1: the cell writes the operand
  bool needs_barrier;  // backward: whether it reads dz that the other product wrote
};

template <int I> struct Int { static constexpr int value = I; };

// Calls f(row, Int<R>) for tiles of R <= MAX_TILE_ROWS rows, of nearly equal height.
template <class F> static inline void for_tiles(int64_t row, int64_t end, F f) {
  int64_t rows = end - row, tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
  for (int64_t i = 0; i < tiles; ++i) {
    int64_t count = rows / tiles + (i < rows % tiles);
    switch (count) {
      case 1: f(row, Int<1>{}); break;
      case 2: f(row, Int<2>{}); break;
#ifndef AMX
      case 3: f(row, Int<3>{}); break;
#endif
#if VL == 16 && !defined(AMX)
      case 4: f(row, Int<4>{}); break;
      case 5: f(row, Int<5>{}); break;
      case 6: f(row, Int<6>{}); break;
#endif
    }
    row += count;
  }
}

// One thread of a scan.
template <class Cell, class Num> struct Worker {
  static constexpr int G = Cell::gates;
  static constexpr int P = sizeof(Cell::products) / sizeof(Product);
  const ScanArguments& a;
  Barrier &all_threads, &group_threads;
  int id, threads, group_size;
  int64_t first, last;           // blocks of this thread
  int64_t first_row, last_row;   // rows of the group, in the current step
  PackedWeights<Num> packed[P];
  Num* operands[P][2];           // forward: (B, depth) each, by parity of the step
  Num* dz_operand[2];            // backward: (B, G·H padded), by parity of the step
  int64_t dz_stride;
  float* bias_sums;              // backward: (G·H) of the group
#ifdef AMX
  TileRows tile_rows;
  float* sums[P];                // (rows, vectors, VL): results of this thread's products
#endif

  int64_t T() const { return a.steps; }
  int64_t B() const { return a.rows; }
  int64_t H() const { return a.units; }
  static int64_t padded(int64_t n) {
    return (n + DEPTH_MULTIPLE - 1) / DEPTH_MULTIPLE * DEPTH_MULTIPLE;
  }
  static int64_t blocks(int64_t units) { return (units + VL - 1) / VL; }
  int lanes(int64_t block) const { return (int)std::min<int64_t>(VL, H() - block * VL); }
  int64_t time(int64_t s) const { return a.reverse ? T() - 1 - s : s; }
  // Indices in the history of the states before and after time t.
  int64_t before(int64_t t) const { return a.reverse ? t + 1 : t; }
  int64_t after(int64_t t) const { return a.reverse ? t : t + 1; }
  // The first line of time t, and of an index in the history.
  int64_t line(int64_t t) const { return a.offsets ? a.offsets[t] : t * B(); }
  int64_t state_line(int64_t index) const { return index ? B() + line(index - 1) : 0; }
  const float* matrix(int which) const { return which ? a.peephole : a.recurrent; }

  // Bytes of each part of the workspace, which starts on a cache line.
  static int64_t region(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t operand_bytes(const ScanArguments& a, int64_t depth) {
    return region((a.rows * padded(depth) + DEPTH_MULTIPLE) * sizeof(Num));
  }
  static int64_t packed_bytes(const ScanArguments& a, const Product& p) {
    return region(blocks(a.units) * VL * p.count * padded(a.units) * sizeof(Num));
  }
  static int64_t bias_bytes(const ScanArguments& a) { return region(G * a.units * sizeof(float)); }
  static int64_t sums_bytes(const ScanArguments& a) {
#ifdef AMX
    return a.rows * 4 * VL * sizeof(float);
#else
    return 0;
#endif
  }
  static int64_t workspace(const ScanArguments& a, int threads, bool is_backward) {
    int64_t bytes = 2 * P * operand_bytes(a, a.units);
    if (is_backward) bytes += 2 * operand_bytes(a, G * a.units) + threads * bias_bytes(a);
    for (const Product& p : Cell::products) bytes += packed_bytes(a, p) + threads * sums_bytes(a);
    return bytes;
  }

  // Threads per group: the fewest with which the weights of each thread fit in its cache. Groups
  // divide the rows and need no barrier between them.
  static int choose_group_size(const ScanArguments& a, int threads) {
    if (a.offsets) return threads;
    int64_t bytes = 0;
    for (const Product& p : Cell::products) bytes += packed_bytes(a, p);
    for (int size = 1; size < threads; ++size) {
      int64_t rows = a.rows * size / threads;
      if (threads % size == 0 && rows >= MIN_GROUP_ROWS &&
          bytes <= size * std::max(CACHED_WEIGHT_BYTES, rows * CACHED_WEIGHT_BYTES_PER_ROW))
        return size;
    }
    return threads;
  }

  Worker(const ScanArguments& a, Barrier* barriers, int id, int threads, char* workspace,
         bool is_backward)
      : Worker(a, barriers, id, threads, choose_group_size(a, threads), workspace, is_backward) {}

  Worker(const ScanArguments& a, Barrier* barriers, int id, int threads, int group_size,
         char* workspace, bool is_backward)
      : a(a), all_threads(barriers[0]), group_threads(barriers[1 + id / group_size]), id(id),
        threads(threads), group_size(group_size),
        first(blocks(H()) * (id % group_size) / group_size),
        last(blocks(H()) * (id % group_size + 1) / group_size),
        first_row(B() * group() / groups()),
        last_row(B() * (group() + 1) / groups())
#ifdef AMX
        , tile_rows(last_row - first_row)
#endif
  {
    auto take = [&](int64_t bytes) {
      workspace += bytes;
      return (Num*)(workspace - bytes);
    };
    dz_stride = padded(G * H());
    for (int i = 0; i < P; ++i)
      for (Num*& operand : operands[i]) operand = zeroed(take(operand_bytes(a, H())), padded(H()));
    if (is_backward) {
      for (Num*& operand : dz_operand)
        operand = zeroed(take(operand_bytes(a, G * H())), dz_stride);
      bias_sums = (float*)take(groups() * bias_bytes(a)) + group() * (bias_bytes(a) / 4);
      for (int g = 0; g < G; ++g)
        std::fill(bias_sums + g * H() + first * VL,
                  bias_sums + g * H() + std::min(last * VL, H()), 0.0f);
    }
    for (int i = 0; i < P; ++i) {
      const Product& p = Cell::products[i];
      Num* data = take(packed_bytes(a, p));
      packed[i] = is_backward ? PackedWeights<Num>{data, padded(p.count * H()), 1}
                              : PackedWeights<Num>{data, padded(H()), p.count};
      is_backward ? pack_backward(i) : pack_forward(i);
#ifdef AMX
      sums[i] = (float*)take(threads * sums_bytes(a)) + id * (sums_bytes(a) / 4);
#endif
    }
#ifdef AMX
    tile_rows.configure();
#endif
    all_threads.wait(threads);
  }
#ifdef AMX
  ~Worker() { _tile_release(); }
#endif

  int group() const { return id / group_size; }
  int groups() const { return threads / group_size; }
  // An operand filled with 0: the first thread of a group fills the rows of the group.
  Num* zeroed(Num* operand, int64_t stride) const {
    if (id % group_size == 0)
      std::fill(operand + first_row * stride,
                operand + last_row * stride + (last_row == B() ? DEPTH_MULTIPLE : 0), Num{});
    return operand;
  }
  // The first of its blocks that this thread packs: the groups share the packing, in fours.
  int64_t pack_begin(int group) const {
    return std::min(last, first + (last - first + 3) / 4 * group / groups() * 4);
  }

  // Packs W[(row_gate + n)·H + unit][k] to (k, n, lane) for each block, as a transpose of 32-bit
  // words: a float or a pair of bf16.
  void pack_forward(int i) {
    const Product& p = Cell::products[i];
    constexpr int K = Pairs<Num>::K, WORDS = 16;
    for (int64_t block = pack_begin(group()); block < pack_begin(group() + 1); ++block)
      for (int n = 0; n < p.count; ++n) {
        Num* out = packed[i].block(block);
        const float* in = matrix(p.matrix) + ((p.row_gate + n) * H() + block * VL) * H();
        for (int64_t k = 0; k < packed[i].depth; k += WORDS * K) {
          alignas(64) uint32_t words[VL][WORDS] = {};
          for (int lane = 0; lane < lanes(block); ++lane)
            convert((Num*)words[lane], in + lane * H() + k, std::min<int64_t>(WORDS * K, H() - k));
          int64_t count = std::min<int64_t>(WORDS, (packed[i].depth - k) / K);
          for (int64_t word = 0; word < count; ++word) {
            uint32_t* column =
                (uint32_t*)(out + packed_offset<Num>(k + word * K, n, p.count, packed[i].depth));
            for (int lane = 0; lane < VL; ++lane) column[lane] = words[lane][word];
          }
        }
      }
  }

  // Packs W[row_gate·H + k][unit] to (k, n, lane), up to four adjacent blocks n at a time.
  void pack_backward(int i) {
    const Product& p = Cell::products[i];
    constexpr int K = Pairs<Num>::K;
    const float* from = matrix(p.matrix) + p.row_gate * H() * H();
    for (int64_t block = pack_begin(group()); block < pack_begin(group() + 1); block += 4) {
      int count = (int)std::min<int64_t>(4, last - block);
      for (int64_t k = 0; k < packed[i].depth; k += K)
        for (int n = 0; n < count; ++n) {
          Num rows[K][VL] = {};
          for (int j = 0; j < K; ++j)
            if (k + j < p.count * H())
              convert(rows[j], from + (k + j) * H() + (block + n) * VL, lanes(block + n));
          Num* out = packed[i].block(block) + packed_offset<Num>(k, n, count, packed[i].depth);
          for (int lane = 0; lane < VL; ++lane)
            for (int j = 0; j < K; ++j) out[lane * K + j] = rows[j][lane];
        }
    }
  }

  // Where rows have lengths, sets last_row to the number of rows that have not ended at step s.
  void set_running_rows(int64_t s) {
    if (!a.offsets || last_row == line(s + 1) - line(s)) return;
    last_row = line(s + 1) - line(s);
#ifdef AMX
    tile_rows = TileRows(last_row);
    tile_rows.configure();
#endif
  }

  // With AMX, computes the products of a phase of step s for all rows of `block`. Otherwise the
  // tiles compute them.
  void multiply_before(int64_t s, int64_t block, bool is_second) {
#ifdef AMX
    for (int i = 0; i < P; ++i)
      if ((Cell::products[i].state < 0) == is_second)
        multiply_all(sums[i], tile_rows, operands[i][s & 1] + first_row * padded(H()),
                     padded(H()), packed[i].block(block), packed[i].vectors, packed[i].depth);
#endif
  }

  void forward();
  void backward();
};

// R rows of one block at one step: the interface for the equations of a cell.
template <class Cell, class Num, int R> struct Tile {
  using W = Worker<Cell, Num>;
  W& w;
  int64_t s, t, row, block;
  int n;

  Tile(W& w, int64_t s, int64_t row, int64_t block)
      : w(w), s(s), t(w.time(s)), row(row), block(block), n(w.lanes(block)) {}

  int64_t unit() const { return block * VL; }
  bool is_tanh() const { return w.a.is_tanh; }
  Num* gate_at(void* base, int r, int g) const {
    return (Num*)base + ((w.line(t) + row + r) * W::G + g) * w.H() + unit();
  }
  float* state_at(int part, int64_t index, int r) const {
    return w.a.history[part] + (w.state_line(index) + row + r) * w.H() + unit();
  }

  vec gate(int r, int g) const { return load(gate_at(w.a.gates, r, g), n); }
  void save_gate(int r, int g, vec v) const { store(gate_at(w.a.gates, r, g), v, n); }
  vec previous(int part, int r) const { return load(state_at(part, w.before(t), r), n); }
  vec current(int part, int r) const { return load(state_at(part, w.after(t), r), n); }

  // Input products and bias of N gates from g on; prefetches the input products of the next step.
  template <int N> void inputs(vec (&sums)[R][N], int g) const {
    const int64_t lines = w.a.reverse ? -w.B() : w.line(t + 1) - w.line(t);
    const int64_t to_next = lines * W::G * w.H();
    for (int i = 0; i < N; ++i) {
      vec bias = load(w.a.bias + (g + i) * w.H() + unit(), n);
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(gate_at(w.a.gates, r, g + i) + to_next);
        sums[r][i] = gate(r, g + i) + bias;
      }
    }
  }
  // sums[r][FIRST + n] += product I for the n-th of its gates.
  template <int I, int FIRST, int M> void add_product(vec (&sums)[R][M]) const {
    constexpr int N = Cell::products[I].count;
#ifdef AMX
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i)
        sums[r][FIRST + i] += load(w.sums[I] + ((row - w.first_row + r) * N + i) * VL, VL);
#else
    int64_t stride = W::padded(w.H());
    multiply<FIRST, N>(sums, w.operands[I][s & 1] + row * stride, stride,
                       w.packed[I].block(block), w.packed[I].depth);
#endif
  }
  // Stores the operand of product i for this step (ahead 0) or for the next (ahead 1).
  void operand(int i, int ahead, int r, vec v) const {
    store(w.operands[i][(s + ahead) & 1] + (row + r) * W::padded(w.H()) + unit(), v, n);
  }
  void save_state(int part, int r, vec v) const {
    store(state_at(part, w.after(t), r), v, n);
    if (part == 0)
      store((Num*)w.a.hidden + (w.line(t) + row + r) * w.H() + unit(), v, n);
    for (int i = 0; i < W::P; ++i)
      if (Cell::products[i].state == part) operand(i, 1, r, v);
  }

  // Backward. delta is δ, the gradient of the state after the step, then of the state before it.
  vec grad_hidden(int r) const {
    return load((const Num*)w.a.grad_hidden + (w.line(t) + row + r) * w.H() + unit(), n);
  }
  float* delta_at(int part, int r) const {
    return w.a.grad_state[part] + (row + r) * w.H() + unit();
  }
  vec delta(int part, int r) const { return load(delta_at(part, r), n); }
  void save_delta(int part, int r, vec v) const { store(delta_at(part, r), v, n); }
  void save_dz(int r, int g, vec v) const {
    float* sum = w.bias_sums + g * w.H() + unit();
    store(sum, load(sum, n) + v, n);
    store(gate_at(w.a.dz, r, g), v, n);
    store(w.dz_operand[s & 1] + (row + r) * w.dz_stride + g * w.H() + unit(), v, n);
  }
};

template <class Cell, class Num> void Worker<Cell, Num>::forward() {
  for (int i = 0; i < P; ++i)
    if (int part = Cell::products[i].state; part >= 0)
      for (int64_t block = first; block < last; ++block)
        for (int64_t row = first_row; row < last_row; ++row) {
          Tile<Cell, Num, 1> tile(*this, 0, row, block);
          tile.operand(i, 0, 0, tile.previous(part, 0));
        }
  group_threads.wait(group_size);
  for (int64_t s = 0; s < T(); ++s) {
    set_running_rows(s);
    for (int64_t block = first; block < last; ++block) {
      multiply_before(s, block, false);
      for_tiles(first_row, last_row, [&](int64_t row, auto rows) {
        Cell::forward(Tile<Cell, Num, rows.value>(*this, s, row, block));
      });
    }
    group_threads.wait(group_size);
    if constexpr (Cell::has_second_phase) {
      for (int64_t block = first; block < last; ++block) {
        multiply_before(s, block, true);
        for_tiles(first_row, last_row, [&](int64_t row, auto rows) {
          Cell::forward_second(Tile<Cell, Num, rows.value>(*this, s, row, block));
        });
      }
      group_threads.wait(group_size);
    }
  }
}

#ifdef AMX
// dz · W of product I for all rows and `count` blocks; Cell::add_gradient receives the sums.
template <class Cell, class Num, int I>
static void product_backward(Worker<Cell, Num>& w, int64_t s, int64_t block, int count) {
  const PackedWeights<Num>& packed = w.packed[I];
  multiply_all(w.sums[I], w.tile_rows,
               w.dz_operand[s & 1] + w.first_row * w.dz_stride + Cell::products[I].gate * w.H(),
               w.dz_stride, packed.block(block), count, packed.depth);
  for (int i = 0; i < count; ++i)
    for (int64_t row = w.first_row; row < w.last_row; ++row)
      Cell::template add_gradient<I>(
          Tile<Cell, Num, 1>(w, s, row, block + i), 0,
          load(w.sums[I] + ((row - w.first_row) * count + i) * VL, VL));
}
#else
// dz · W for R rows and N blocks. Not inlined: one copy for all cells saves compile time.
template <class Num, int R, int N>
[[gnu::noinline]] static void sum_backward(vec (&out)[R][N], const Num* dz, int64_t stride,
                                           const Num* weights, int64_t depth) {
  vec sums[R][N] = {};
  multiply<0, N>(sums, dz, stride, weights, depth);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) out[r][i] = sums[r][i];
}

// dz · W of product I for R rows and N blocks; Cell::add_gradient receives the sums.
template <class Cell, class Num, int I, int R, int N>
static inline void rows_backward(Worker<Cell, Num>& w, int64_t s, int64_t row, int64_t block) {
  vec sums[R][N];
  const PackedWeights<Num>& packed = w.packed[I];
  sum_backward<Num, R, N>(sums, w.dz_operand[s & 1] + row * w.dz_stride +
                                    Cell::products[I].gate * w.H(),
                          w.dz_stride, packed.block(block), packed.depth);
  for (int i = 0; i < N; ++i) {
    Tile<Cell, Num, R> tile(w, s, row, block + i);
    for (int r = 0; r < R; ++r) Cell::template add_gradient<I>(tile, r, sums[r][i]);
  }
}

// The same for all rows and `count` blocks, up to four.
template <class Cell, class Num, int I>
static void product_backward(Worker<Cell, Num>& w, int64_t s, int64_t block, int count) {
  for_tiles(w.first_row, w.last_row, [&](int64_t row, auto rows) {
    constexpr int R = rows.value;
    switch (count) {
      case 1: rows_backward<Cell, Num, I, R, 1>(w, s, row, block); break;
      case 2: rows_backward<Cell, Num, I, R, 2>(w, s, row, block); break;
      case 3: rows_backward<Cell, Num, I, R, 3>(w, s, row, block); break;
      default: rows_backward<Cell, Num, I, R, 4>(w, s, row, block);
    }
  });
}
#endif

template <class Cell, class Num, int I>
static void all_products_backward(Worker<Cell, Num>& w, int64_t s) {
  if (Cell::products[I].needs_barrier) w.group_threads.wait(w.group_size);
  for (int64_t block = w.first; block < w.last; block += 4)
    product_backward<Cell, Num, I>(w, s, block, (int)std::min<int64_t>(4, w.last - block));
}

template <class Cell, class Num> void Worker<Cell, Num>::backward() {
  for (int64_t s = T() - 1; s >= 0; --s) {
    set_running_rows(s);
    for_tiles(first_row, last_row, [&](int64_t row, auto rows) {
      for (int64_t block = first; block < last; ++block)
        Cell::backward(Tile<Cell, Num, rows.value>(*this, s, row, block));
    });
    group_threads.wait(group_size);
    all_products_backward<Cell, Num, P - 1>(*this, s);
    if constexpr (P == 2) all_products_backward<Cell, Num, 0>(*this, s);
  }
  all_threads.wait(threads);
  const float* sums = bias_sums - group() * (bias_bytes(a) / 4);
  for (int64_t i = G * H() * id / threads; i < G * H() * (id + 1) / threads; ++i)
    for (int other = 0; other < groups(); ++other)
      a.grad_bias[i] += sums[other * (bias_bytes(a) / 4) + i];
}

template <class Cell, class Num> static void run(const ScanArguments& a, Barrier* barriers, int id,
                                                 int threads, void* workspace, bool is_backward) {
  Worker<Cell, Num> worker(a, barriers, id, threads, (char*)workspace, is_backward);
  is_backward ? worker.backward() : worker.forward();
}
