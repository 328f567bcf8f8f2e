// One driver for all cells: packed weights, register tiles, a thread team, one barrier a phase.
// Included once for each instruction set, inside its namespace; see native.cpp.
//
// T steps, B rows, H hidden units, G gates. Each thread owns blocks of VL hidden units with all
// their gates, for all rows or for those of its group. The weights are packed once a call, and what
// a thread needs of them stays in its cache over all steps. A tile is up to MOST_ROWS rows of one block (forward) or of up to four
// blocks (backward); its sums live in registers until the cell has made activations and state of
// them. With AMX they come out of tile registers through a few KB of memory.
//
// Rows of different lengths are sorted, the longest first, and a step has the rows that have not
// ended: its lines begin where `offsets` says. All threads then share all rows, which would
// otherwise leave the threads with the short rows without work.

#if defined(AMX)
constexpr int MOST_ROWS = 2;  // the sums wait in memory
#elif VL == 16
constexpr int MOST_ROWS = 6;
#else
constexpr int MOST_ROWS = 3;
#endif

template <class Num> struct Pairs { static constexpr int K = 1; };  // rows of weights interleaved
template <> struct Pairs<bf16> { static constexpr int K = 2; };

// Operands are as long as a multiple of STEP; what is beyond their end meets weights of 0. At most
// MOST_WIDE vectors of weights are read side by side.
#ifdef AMX
constexpr int64_t STEP = 32;
constexpr int MOST_WIDE = 2;
#else
constexpr int64_t STEP = 2;
constexpr int MOST_WIDE = 4;
#endif

// Weights that a thread reads in every step: as many as its own cache holds, or more where many
// rows meet them. Fewer rows than LEAST_ROWS are not worth reading all weights. All by measurement.
constexpr int64_t NEAR_BYTES = 5 << 18, NEAR_BYTES_A_ROW = 1 << 16, LEAST_ROWS = 4;

// A matrix packed for products, block by block of VL units: for up to MOST_WIDE vectors, for each k
// (or pair of them), these vectors. A unit has `wide` vectors in the forward, one in the backward.
template <class Num> struct Pack {
  Num* data;
  int64_t depth;  // operand length, padded
  int wide;
  Num* block(int64_t index) const { return data + index * depth * wide * VL; }
};

// Where the vector n of `wide` stands for k, in the weights of a block, or of blocks side by side.
template <class Num> static inline int64_t place(int64_t k, int n, int64_t wide, int64_t depth) {
  int side = n / MOST_WIDE * MOST_WIDE;
  int64_t width = std::min<int64_t>(MOST_WIDE, wide - side);
  return (side * depth + k * width + (n - side) * Pairs<Num>::K) * VL;
}

// n numbers as operands of products.
template <class Num> static inline void convert(Num* to, const float* from, int64_t n) {
  for (; n > 0; n -= VL, to += VL, from += VL) {
    int many = (int)std::min<int64_t>(VL, n);
    store(to, load(from, many), many);
  }
}

// sums[r][FIRST + n] += operand[r] · weights[n] over `depth`, for N vectors of weights. The sums are
// copied, since only those that nobody else can see stay in registers all along; with the operands
// of R rows and one vector of weights they are 16 in AVX2.
template <int FIRST, int N, int R, int M>
static inline void multiply(vec (&sums)[R][M], const float* operand, int64_t stride,
                            const float* weights, int64_t depth) {
  vec own[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) own[r][n] = sums[r][FIRST + n];
  for (int64_t k = 0; k < depth; ++k, weights += N * VL) {
    vec x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = splat(operand[r * stride + k]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      vec w = load(weights + n * VL);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) own[r][n] += x[r] * w;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sums[r][FIRST + n] = own[r][n];
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
// Sums of tiles: up to 16 rows by 16 units each, M tiles of rows by N of vectors, all sums at once.
// Tile registers 0 to 3 hold sums, 4 and 5 operands, 6 and 7 weights.
template <int M, int N>
static inline void multiply_tiles(float* const (&out)[2], int64_t out_stride,
                                  const bf16* const (&operand)[2], int64_t stride,
                                  const bf16* weights, int64_t depth) {
  _tile_zero(0);
  if (N == 2) _tile_zero(1);
  if (M == 2) _tile_zero(2);
  if (M == 2 && N == 2) _tile_zero(3);
  for (int64_t k = 0; k < depth; k += STEP) {
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

// How rows are cut into tiles of one height; the last may take rows of the one before it again.
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

// (row, vector, lane) = the products of all rows with `wide` vectors of weights.
static inline void multiply_all(float* sums, const TileRows& rows, const bf16* operand,
                                int64_t stride, const bf16* weights, int64_t wide, int64_t depth) {
  for (int64_t tile = 0; tile < rows.tiles; tile += 2) {
    bool is_pair = tile + 1 < rows.tiles;
    int64_t first = rows.begin(tile), second = is_pair ? rows.begin(tile + 1) : first;
    const bf16* const operands[2] = {operand + first * stride, operand + second * stride};
    for (int64_t n = 0; n < wide; n += 2) {
      float* const out[2] = {sums + (first * wide + n) * VL, sums + (second * wide + n) * VL};
      const bf16* from = weights + n * depth * VL;
      bool is_wide = n + 1 < wide;
      if (is_pair && is_wide)
        multiply_tiles<2, 2>(out, wide * VL, operands, stride, from, depth);
      else if (is_pair)
        multiply_tiles<2, 1>(out, wide * VL, operands, stride, from, depth);
      else if (is_wide)
        multiply_tiles<1, 2>(out, wide * VL, operands, stride, from, depth);
      else
        multiply_tiles<1, 1>(out, wide * VL, operands, stride, from, depth);
    }
  }
}
#endif

// Which gates a recurrent product adds to, and which rows of which matrix it takes.
struct Product {
  int matrix;    // 0: weight_recurrent, 1: weight_peephole
  int row_gate;  // first row block in the matrix
  int gate;      // first gate it adds to
  int count;     // gates
  int state;     // the state part that is its operand; -1: the cell writes it itself
  bool waits;    // backward: whether it reads what another product's end wrote
};

template <int I> struct Int { static constexpr int value = I; };

// Calls f(row, Int<R>) for tiles of at most MOST_ROWS of these rows, as equal as can be.
template <class F> static inline void for_tiles(int64_t row, int64_t end, F f) {
  int64_t rows = end - row, tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
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

template <class Cell, class Num> struct Worker {
  static constexpr int G = Cell::gates;
  static constexpr int P = sizeof(Cell::products) / sizeof(Product);
  const Arguments& a;
  Team &everyone, &team;         // all threads; those of the own group
  int id, threads, mates;        // mates: threads a group
  int64_t first, last;           // own blocks
  int64_t first_row, last_row;   // of the group, in the current step
  Pack<Num> packs[P];
  Num* operands[P][2];           // forward: (B, depth) each, by parity of the step
  Num* dz_operand[2];            // backward: (B, G·H padded)
  int64_t dz_stride;
  float* bias_sums;              // backward: (groups, G·H)
#ifdef AMX
  TileRows tile_rows;
  float* sums[P];                // own, (rows, vectors, VL): what the tile registers leave
#endif

  int64_t T() const { return a.steps; }
  int64_t B() const { return a.rows; }
  int64_t H() const { return a.units; }
  static int64_t padded(int64_t n) { return (n + STEP - 1) / STEP * STEP; }
  static int64_t blocks(int64_t units) { return (units + VL - 1) / VL; }
  int lanes(int64_t block) const { return (int)std::min<int64_t>(VL, H() - block * VL); }
  int64_t time(int64_t s) const { return a.reverse ? T() - 1 - s : s; }
  int64_t before(int64_t t) const { return a.reverse ? t + 1 : t; }
  int64_t after(int64_t t) const { return a.reverse ? t : t + 1; }
  // The first line of a time in what has a line for each row, and of a place in the history.
  int64_t line(int64_t t) const { return a.offsets ? a.offsets[t] : t * B(); }
  int64_t state_line(int64_t place) const { return place ? B() + line(place - 1) : 0; }
  const float* matrix(int which) const { return which ? a.peephole : a.recurrent; }

  // Bytes of each part of the workspace; every region starts on a cache line.
  static int64_t region(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t operand_bytes(const Arguments& a, int64_t numbers) {
    return region((a.rows * padded(numbers) + STEP) * sizeof(Num));
  }
  static int64_t pack_bytes(const Arguments& a, const Product& p) {
    return region(blocks(a.units) * VL * p.count * padded(a.units) * sizeof(Num));
  }
  static int64_t bias_bytes(const Arguments& a) { return region(G * a.units * sizeof(float)); }
  static int64_t sums_bytes(const Arguments& a) {
#ifdef AMX
    return a.rows * 4 * VL * sizeof(float);
#else
    return 0;
#endif
  }
  static int64_t workspace(const Arguments& a, int threads, bool is_backward) {
    int64_t need = 2 * P * operand_bytes(a, a.units);
    if (is_backward) need += 2 * operand_bytes(a, G * a.units) + threads * bias_bytes(a);
    for (const Product& p : Cell::products) need += pack_bytes(a, p) + threads * sums_bytes(a);
    return need;
  }

  // Threads a group: as few as let the weights of each thread stay near it. Groups have rows of
  // their own and never wait for each other.
  static int mates_of(const Arguments& a, int threads) {
    if (a.offsets) return threads;
    int64_t bytes = 0;
    for (const Product& p : Cell::products) bytes += pack_bytes(a, p);
    for (int mates = 1; mates < threads; ++mates) {
      int64_t rows = a.rows * mates / threads;
      if (threads % mates == 0 && rows >= LEAST_ROWS &&
          bytes <= mates * std::max(NEAR_BYTES, rows * NEAR_BYTES_A_ROW))
        return mates;
    }
    return threads;
  }

  Worker(const Arguments& a, Team* teams, int id, int threads, char* space, bool is_backward)
      : Worker(a, teams, id, threads, mates_of(a, threads), space, is_backward) {}

  Worker(const Arguments& a, Team* teams, int id, int threads, int mates, char* space,
         bool is_backward)
      : a(a), everyone(teams[0]), team(teams[1 + id / mates]), id(id), threads(threads),
        mates(mates), first(blocks(H()) * (id % mates) / mates),
        last(blocks(H()) * (id % mates + 1) / mates), first_row(B() * group() / groups()),
        last_row(B() * (group() + 1) / groups())
#ifdef AMX
        , tile_rows(last_row - first_row)
#endif
  {
    auto take = [&](int64_t bytes) {
      space += bytes;
      return (Num*)(space - bytes);
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
      Num* data = take(pack_bytes(a, p));
      packs[i] = is_backward ? Pack<Num>{data, padded(p.count * H()), 1}
                             : Pack<Num>{data, padded(H()), p.count};
      is_backward ? pack_backward(i) : pack_forward(i);
#ifdef AMX
      sums[i] = (float*)take(threads * sums_bytes(a)) + id * (sums_bytes(a) / 4);
#endif
    }
#ifdef AMX
    tile_rows.configure();
#endif
    everyone.wait(threads);
  }
#ifdef AMX
  ~Worker() { _tile_release(); }
#endif

  int group() const { return id / mates; }
  int groups() const { return threads / mates; }
  // Operands of rows, all 0: the first thread of a group clears its rows.
  Num* zeroed(Num* operand, int64_t stride) const {
    if (id % mates == 0)
      std::fill(operand + first_row * stride,
                operand + last_row * stride + (last_row == B() ? STEP : 0), Num{});
    return operand;
  }
  // What this thread packs of its blocks: the groups divide them, in fours.
  int64_t pack_begin(int group) const {
    return std::min(last, first + (last - first + 3) / 4 * group / groups() * 4);
  }

  // (k, n, lane) = W[(row_gate + n)·H + unit][k] for each block. Words of 32 bits, a
  // float or a pair of bf16, are moved from rows of k to columns of lanes.
  void pack_forward(int i) {
    const Product& p = Cell::products[i];
    constexpr int K = Pairs<Num>::K, WORDS = 16;
    for (int64_t block = pack_begin(group()); block < pack_begin(group() + 1); ++block)
      for (int n = 0; n < p.count; ++n) {
        Num* out = packs[i].block(block);
        const float* in = matrix(p.matrix) + ((p.row_gate + n) * H() + block * VL) * H();
        for (int64_t k = 0; k < packs[i].depth; k += WORDS * K) {
          alignas(64) uint32_t words[VL][WORDS] = {};
          for (int lane = 0; lane < lanes(block); ++lane)
            convert((Num*)words[lane], in + lane * H() + k, std::min<int64_t>(WORDS * K, H() - k));
          int64_t many = std::min<int64_t>(WORDS, (packs[i].depth - k) / K);
          for (int64_t word = 0; word < many; ++word) {
            uint32_t* column =
                (uint32_t*)(out + place<Num>(k + word * K, n, p.count, packs[i].depth));
            for (int lane = 0; lane < VL; ++lane) column[lane] = words[lane][word];
          }
        }
      }
  }

  // (k, n, lane) = W[row_gate·H + k][unit], four blocks side by side.
  void pack_backward(int i) {
    const Product& p = Cell::products[i];
    constexpr int K = Pairs<Num>::K;
    const float* from = matrix(p.matrix) + p.row_gate * H() * H();
    for (int64_t block = pack_begin(group()); block < pack_begin(group() + 1); block += 4) {
      int wide = (int)std::min<int64_t>(4, last - block);
      for (int64_t k = 0; k < packs[i].depth; k += K)
        for (int n = 0; n < wide; ++n) {
          Num rows[K][VL] = {};
          for (int j = 0; j < K; ++j)
            if (k + j < p.count * H())
              convert(rows[j], from + (k + j) * H() + (block + n) * VL, lanes(block + n));
          Num* out = packs[i].block(block) + place<Num>(k, n, wide, packs[i].depth);
          for (int lane = 0; lane < VL; ++lane)
            for (int j = 0; j < K; ++j) out[lane * K + j] = rows[j][lane];
        }
    }
  }

  // Takes the rows that have not ended at a step, where rows have lengths.
  void take_rows(int64_t s) {
    if (!a.offsets || last_row == line(s + 1) - line(s)) return;
    last_row = line(s + 1) - line(s);
#ifdef AMX
    tile_rows = TileRows(last_row);
    tile_rows.configure();
#endif
  }

  // The products that a phase of `block` begins with, where they are not made in its tiles.
  void multiply_before(int64_t s, int64_t block, bool is_second) {
#ifdef AMX
    for (int i = 0; i < P; ++i)
      if ((Cell::products[i].state < 0) == is_second)
        multiply_all(sums[i], tile_rows, operands[i][s & 1] + first_row * padded(H()),
                     padded(H()), packs[i].block(block), packs[i].wide, packs[i].depth);
#endif
  }

  void forward();
  void backward();
};

// R rows of one block at one step: what a cell's equations are written with.
template <class Cell, class Num, int R> struct Tile {
  using W = Worker<Cell, Num>;
  W& w;
  int64_t s, t, row, block;
  int n;

  Tile(W& w, int64_t s, int64_t row, int64_t block)
      : w(w), s(s), t(w.time(s)), row(row), block(block), n(w.lanes(block)) {}

  int64_t unit() const { return block * VL; }
  bool is_other() const { return w.a.is_other_form; }
  Num* gate_at(void* base, int r, int g) const {
    return (Num*)base + ((w.line(t) + row + r) * W::G + g) * w.H() + unit();
  }
  float* state_at(int part, int64_t place, int r) const {
    return w.a.history[part] + (w.state_line(place) + row + r) * w.H() + unit();
  }

  vec gate(int r, int g) const { return load(gate_at(w.a.gates, r, g), n); }
  void save_gate(int r, int g, vec v) const { store(gate_at(w.a.gates, r, g), v, n); }
  vec previous(int part, int r) const { return load(state_at(part, w.before(t), r), n); }
  vec current(int part, int r) const { return load(state_at(part, w.after(t), r), n); }

  // Input products and bias; the next step's are asked for from memory meanwhile.
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
  // sums[r][FIRST + n] += what product I gives for the n-th of its gates.
  template <int I, int FIRST, int M> void add_product(vec (&sums)[R][M]) const {
    constexpr int N = Cell::products[I].count;
#ifdef AMX
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i)
        sums[r][FIRST + i] += load(w.sums[I] + ((row - w.first_row + r) * N + i) * VL, VL);
#else
    int64_t stride = W::padded(w.H());
    multiply<FIRST, N>(sums, w.operands[I][s & 1] + row * stride, stride,
                       w.packs[I].block(block), w.packs[I].depth);
#endif
  }
  // An operand that a product of this step (ahead 0) or of the next (ahead 1) takes.
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

  // Backward.
  vec grad_hidden(int r) const {
    return load((const Num*)w.a.grad_hidden + (w.line(t) + row + r) * w.H() + unit(), n);
  }
  float* delta_at(int part, int r) const { return w.a.delta[part] + (row + r) * w.H() + unit(); }
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
  team.wait(mates);
  for (int64_t s = 0; s < T(); ++s) {
    take_rows(s);
    for (int64_t block = first; block < last; ++block) {
      multiply_before(s, block, false);
      for_tiles(first_row, last_row, [&](int64_t row, auto rows) {
        Cell::forward(Tile<Cell, Num, rows.value>(*this, s, row, block));
      });
    }
    team.wait(mates);
    if constexpr (Cell::has_second_phase) {
      for (int64_t block = first; block < last; ++block) {
        multiply_before(s, block, true);
        for_tiles(first_row, last_row, [&](int64_t row, auto rows) {
          Cell::forward_second(Tile<Cell, Num, rows.value>(*this, s, row, block));
        });
      }
      team.wait(mates);
    }
  }
}

#ifdef AMX
// delta += dz · W for all rows and up to four blocks; Cell::after takes each sum.
template <class Cell, class Num, int I>
static void product_backward(Worker<Cell, Num>& w, int64_t s, int64_t block, int wide) {
  const Pack<Num>& pack = w.packs[I];
  multiply_all(w.sums[I], w.tile_rows,
               w.dz_operand[s & 1] + w.first_row * w.dz_stride + Cell::products[I].gate * w.H(),
               w.dz_stride, pack.block(block), wide, pack.depth);
  for (int i = 0; i < wide; ++i)
    for (int64_t row = w.first_row; row < w.last_row; ++row)
      Cell::template after<I>(Tile<Cell, Num, 1>(w, s, row, block + i), 0,
                              load(w.sums[I] + ((row - w.first_row) * wide + i) * VL, VL));
}
#else
// The sums of a backward product; one copy for all cells, since these are the most to compile.
template <class Num, int R, int N>
[[gnu::noinline]] static void sum_backward(vec (&out)[R][N], const Num* dz, int64_t stride,
                                           const Num* weights, int64_t depth) {
  vec sums[R][N] = {};
  multiply<0, N>(sums, dz, stride, weights, depth);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) out[r][i] = sums[r][i];
}

// delta += dz · W for R rows and N blocks; Cell::after takes each sum.
template <class Cell, class Num, int I, int R, int N>
static inline void rows_backward(Worker<Cell, Num>& w, int64_t s, int64_t row, int64_t block) {
  vec sums[R][N];
  const Pack<Num>& pack = w.packs[I];
  sum_backward<Num, R, N>(sums, w.dz_operand[s & 1] + row * w.dz_stride +
                                    Cell::products[I].gate * w.H(),
                          w.dz_stride, pack.block(block), pack.depth);
  for (int i = 0; i < N; ++i) {
    Tile<Cell, Num, R> tile(w, s, row, block + i);
    for (int r = 0; r < R; ++r) Cell::template after<I>(tile, r, sums[r][i]);
  }
}

// The same for all rows and up to four blocks.
template <class Cell, class Num, int I>
static void product_backward(Worker<Cell, Num>& w, int64_t s, int64_t block, int wide) {
  for_tiles(w.first_row, w.last_row, [&](int64_t row, auto rows) {
    constexpr int R = rows.value;
    switch (wide) {
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
  if (Cell::products[I].waits) w.team.wait(w.mates);
  for (int64_t block = w.first; block < w.last; block += 4)
    product_backward<Cell, Num, I>(w, s, block, (int)std::min<int64_t>(4, w.last - block));
}

template <class Cell, class Num> void Worker<Cell, Num>::backward() {
  for (int64_t s = T() - 1; s >= 0; --s) {
    take_rows(s);
    for_tiles(first_row, last_row, [&](int64_t row, auto rows) {
      for (int64_t block = first; block < last; ++block)
        Cell::backward(Tile<Cell, Num, rows.value>(*this, s, row, block));
    });
    team.wait(mates);
    all_products_backward<Cell, Num, P - 1>(*this, s);
    if constexpr (P == 2) all_products_backward<Cell, Num, 0>(*this, s);
  }
  everyone.wait(threads);
  const float* sums = bias_sums - group() * (bias_bytes(a) / 4);
  for (int64_t i = G * H() * id / threads; i < G * H() * (id + 1) / threads; ++i)
    for (int other = 0; other < groups(); ++other)
      a.grad_bias[i] += sums[other * (bias_bytes(a) / 4) + i];
}

template <class Cell, class Num> static void run(const Arguments& a, Team* teams, int id,
                                                 int threads, void* space, bool is_backward) {
  Worker<Cell, Num> worker(a, teams, id, threads, (char*)space, is_backward);
  is_backward ? worker.backward() : worker.forward();
}
