// The loop over time of all cells: packed weights, register tiles, one barrier per phase of a step.
// Included once for each instruction set, inside its namespace; see native.cpp.
//
// T steps, B rows, H hidden units, G gates. VL floats per vector; a block is VL hidden units with
// all their gates. Each thread owns blocks, for all rows or for the rows of its group of threads.
// The recurrent weights are packed once per call; those of a thread stay in its L2 cache over all
// steps. The products of one block (forward) or of up to four blocks (backward) are computed for
// all rows, see packed.h; from their sums, in a buffer in the first-level cache, the cell then
// computes activations and state.
//
// Rows of different lengths are sorted by decreasing length (layout.py): a step has the rows that
// have not ended, and its lines begin at `offsets`.
//
// Cost: T·B·H·H multiply-adds per gate of each recurrent product, forward and again backward.
// Workspace: the packed weights, operands of two steps (2·B·H per product, in the backward of
// padded depths also 2·B·G·H of dz) and, in the backward, G·H bias sums per group. The input
// products and the weight gradients are single products, computed by the caller.

// Most bytes of weights that a thread reads in each step, and the same per row where that is more;
// a group has at least MIN_GROUP_ROWS rows. Chosen by measurement.
constexpr int64_t CACHED_WEIGHT_BYTES = 5 << 18, CACHED_WEIGHT_BYTES_PER_ROW = 1 << 16,
                  MIN_GROUP_ROWS = 4;

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

// Calls f(row, Int<R>) for pairs of rows, and for the last row of an odd number: two rows give the
// arithmetic of a cell with one gate something to overlap with.
template <class F> static inline void for_tiles(int64_t rows, F f) {
  for (int64_t row = 0; row + 1 < rows; row += 2) f(row, Int<2>{});
  if (rows % 2) f(rows - 1, Int<1>{});
}

// One thread of a scan.
template <class Cell, class Num> struct Worker {
  static constexpr int G = Cell::gates;
  static constexpr int P = sizeof(Cell::products) / sizeof(Product);
  const ScanArguments& a;
  Barrier &all_threads, &group_threads;
  int id, threads, group_size;
  int64_t first, last;           // blocks of this thread
  int64_t rows;                  // of the group, in the current step
  int64_t first_row, row_step;   // indices of these rows in a step
  PackedWeights<Num> packed[P];
  Num* operands[P][2];           // forward: (rows, depth) each, by parity of the step
  // Backward: operands (rows, G·H padded), by parity of the step; null if the products read a.dz.
  Num* dz_operand[2] = {};
  int64_t dz_stride;             // from row to row of dz_rows()
  float* bias_sums;              // backward: (G·H) of the group
  TileRows tile_rows;
  float* sums[P];                // (rows, vectors, VL): results of this thread's products

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
  // Whether the products of the backward can read a.dz: if no depth has to be padded.
  static bool reads_dz(const ScanArguments& a) {
    for (const Product& p : Cell::products)
      if (p.count * a.units % DEPTH_MULTIPLE) return false;
    return true;
  }
  // dz of the rows of this group at step s, the rows `dz_stride` apart.
  Num* dz_rows(int64_t s) const {
    if (dz_operand[0]) return dz_operand[s & 1];
    return (Num*)a.dz + (line(time(s)) + first_row) * G * H();
  }
  // An operand of the rows of a group; products read up to DEPTH_MULTIPLE elements beyond it.
  static int64_t operand_bytes(int64_t rows, int64_t depth) {
    return region((rows * padded(depth) + DEPTH_MULTIPLE) * sizeof(Num));
  }
  static int64_t packed_bytes(const ScanArguments& a, const Product& p) {
    return region(blocks(a.units) * VL * p.count * padded(a.units) * sizeof(Num));
  }
  static int64_t bias_bytes(const ScanArguments& a) { return region(G * a.units * sizeof(float)); }
  static int64_t sums_bytes(const ScanArguments& a) {
    return region(a.rows * 4 * VL * sizeof(float));
  }
  static int64_t workspace(const ScanArguments& a, int threads, bool is_backward) {
    // Enough for any number of groups: OpenMP may provide fewer threads. Each group may have one
    // row more than its share, and the padding of an operand.
    auto operands = [&](int64_t depth) {
      return 2 * (operand_bytes(a.rows, depth) + threads * operand_bytes(1, depth));
    };
    int64_t bytes = P * operands(a.units);
    if (is_backward) bytes += threads * bias_bytes(a);
    if (is_backward && !reads_dz(a)) bytes += operands(G * a.units);
    for (const Product& p : Cell::products) bytes += packed_bytes(a, p) + threads * sums_bytes(a);
    return bytes;
  }

  // Groups divide the rows and need no barrier between them. Rows with lengths, which decrease, are
  // divided in turn, so that each group has long ones; others in adjacent ranges, so that the
  // groups share fewer cache lines. The number of rows of this group, of the first `count`.
  int64_t rows_of_group(int64_t count) const {
    if (a.offsets) return (count - group() + groups() - 1) / groups();
    return count * (group() + 1) / groups() - count * group() / groups();
  }
  // Threads per group: the fewest with which the weights of each thread fit in its cache.
  static int choose_group_size(const ScanArguments& a, int threads) {
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
        rows(rows_of_group(B())),
        first_row(a.offsets ? group() : B() * group() / groups()),
        row_step(a.offsets ? groups() : 1), tile_rows(rows) {
    auto take = [&](int64_t bytes) {
      workspace += bytes;
      return (Num*)(workspace - bytes);
    };
    dz_stride = reads_dz(a) ? row_step * G * H() : padded(G * H());
    auto take_operand = [&](int64_t depth) {
      const int64_t bytes = operand_bytes((B() + groups() - 1) / groups(), depth);
      Num* operand = take(groups() * bytes) + group() * (bytes / (int64_t)sizeof(Num));
      if (id % group_size == 0) std::memset((void*)operand, 0, bytes);
      return operand;
    };
    for (int i = 0; i < P; ++i)
      for (Num*& operand : operands[i]) operand = take_operand(H());
    if (is_backward) {
      if (!reads_dz(a))
        for (Num*& operand : dz_operand) operand = take_operand(G * H());
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
      sums[i] = (float*)take(threads * sums_bytes(a)) + id * (sums_bytes(a) / 4);
    }
    tile_rows.configure();
    all_threads.wait(threads);
  }
#ifdef AMX
  ~Worker() { _tile_release(); }
#endif

  int group() const { return id / group_size; }
  int groups() const { return threads / group_size; }
  // The index in a step of a row of the group.
  int64_t in_step(int64_t row) const { return first_row + row * row_step; }
  // The first of its blocks that this thread packs: the groups share the packing, in fours.
  int64_t pack_begin(int group) const {
    return std::min(last, first + (last - first + 3) / 4 * group / groups() * 4);
  }

  // Packs W[(row_gate + n)·H + unit][k] to (k, n, lane) for each block, as a transpose of 32-bit
  // words: a float or a pair of bf16.
  void pack_forward(int i) {
    const Product& p = Cell::products[i];
    constexpr int K = Pairs<Num>::K;
    for (int64_t block = pack_begin(group()); block < pack_begin(group() + 1); ++block)
      for (int n = 0; n < p.count; ++n) {
        Num* out = packed[i].block(block);
        const float* in = matrix(p.matrix) + ((p.row_gate + n) * H() + block * VL) * H();
        for (int64_t k = 0; k < packed[i].depth; k += WORDS * K) {
          Words words = {};
          for (int lane = 0; lane < lanes(block); ++lane)
            convert((Num*)words[lane], in + lane * H() + k, std::min<int64_t>(WORDS * K, H() - k));
          const int64_t count = std::min<int64_t>(WORDS, (packed[i].depth - k) / K);
          store_columns(words, count, [&](int64_t w) {
            return (Word*)(out + packed_offset<Num>(k + w * K, n, p.count, packed[i].depth));
          });
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
          vec rows[K] = {};
          for (int j = 0; j < K; ++j)
            if (k + j < p.count * H())
              rows[j] = load(from + (k + j) * H() + (block + n) * VL, lanes(block + n));
          interleave(packed[i].block(block) + packed_offset<Num>(k, n, count, packed[i].depth),
                     rows);
        }
    }
  }

  // Sets `rows` to the number of rows of the group that have not ended at step s. Returns whether
  // there are any.
  bool set_running_rows(int64_t s) {
    if (!a.offsets) return true;
    const int64_t running = rows_of_group(line(s + 1) - line(s));
    if (running == rows) return rows > 0;
    rows = running;
    if (rows == 0) return false;
    tile_rows = TileRows(rows);
    tile_rows.configure();
    return true;
  }

  // Computes the products of a phase of step s for all rows of `block`.
  void multiply_before(int64_t s, int64_t block, bool is_second) {
    for (int i = 0; i < P; ++i)
      if ((Cell::products[i].state < 0) == is_second)
        multiply_all(sums[i], tile_rows, operands[i][s & 1], padded(H()), packed[i].block(block),
                     packed[i].vectors, packed[i].depth);
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
    return (Num*)base + ((w.line(t) + w.in_step(row + r)) * W::G + g) * w.H() + unit();
  }
  float* state_at(int part, int64_t index, int r) const {
    return w.a.history[part] + (w.state_line(index) + w.in_step(row + r)) * w.H() + unit();
  }

  vec gate(int r, int g) const { return load(gate_at(w.a.gates, r, g), n); }
  void save_gate(int r, int g, vec v) const { store(gate_at(w.a.gates, r, g), v, n); }
  vec previous(int part, int r) const { return load(state_at(part, w.before(t), r), n); }
  vec current(int part, int r) const { return load(state_at(part, w.after(t), r), n); }

  // Lines from this step to the next one of the forward. Its part of (T, ...) is prefetched.
  int64_t to_next() const { return w.a.reverse ? -w.B() : w.line(t + 1) - w.line(t); }

  // Input products and bias of N gates from g on.
  template <int N> void inputs(vec (&sums)[R][N], int g) const {
    const int64_t ahead = to_next() * W::G * w.H();
    for (int i = 0; i < N; ++i) {
      vec bias = load(w.a.bias + (g + i) * w.H() + unit(), n);
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(gate_at(w.a.gates, r, g + i) + ahead, 1);
        sums[r][i] = gate(r, g + i) + bias;
      }
    }
  }
  // sums[r][FIRST + n] += product I for the n-th of its gates.
  template <int I, int FIRST, int M> void add_product(vec (&sums)[R][M]) const {
    constexpr int N = Cell::products[I].count;
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i)
        sums[r][FIRST + i] += load(w.sums[I] + ((row + r) * N + i) * VL);
  }
  // Stores the operand of product i for this step (ahead 0) or for the next (ahead 1).
  void operand(int i, int ahead, int r, vec v) const {
    store(w.operands[i][(s + ahead) & 1] + (row + r) * W::padded(w.H()) + unit(), v, n);
  }
  void save_state(int part, int r, vec v) const {
    const int64_t ahead = to_next() * w.H();
    float* state = state_at(part, w.after(t), r);
    store(state, v, n);
    __builtin_prefetch(state + ahead, 1);
    if (part == 0) {
      Num* hidden = (Num*)w.a.hidden + (w.line(t) + w.in_step(row + r)) * w.H() + unit();
      store(hidden, v, n);
      __builtin_prefetch(hidden + ahead, 1);
    }
    for (int i = 0; i < W::P; ++i)
      if (Cell::products[i].state == part) operand(i, 1, r, v);
  }

  // Backward. delta is δ, the gradient of the state after the step, then of the state before it.
  vec grad_hidden(int r) const {
    return load((const Num*)w.a.grad_hidden + (w.line(t) + w.in_step(row + r)) * w.H() + unit(), n);
  }
  float* delta_at(int part, int r) const {
    return w.a.grad_state[part] + w.in_step(row + r) * w.H() + unit();
  }
  vec delta(int part, int r) const { return load(delta_at(part, r), n); }
  void save_delta(int part, int r, vec v) const { store(delta_at(part, r), v, n); }
  void save_dz(int r, int g, vec v) const {
    float* sum = w.bias_sums + g * w.H() + unit();
    store(sum, load(sum, n) + v, n);
    store(gate_at(w.a.dz, r, g), v, n);
    if (Num* operand = w.dz_operand[s & 1])
      store(operand + (row + r) * w.dz_stride + g * w.H() + unit(), v, n);
  }
};

template <class Cell, class Num> void Worker<Cell, Num>::forward() {
  for (int i = 0; i < P; ++i)
    if (int part = Cell::products[i].state; part >= 0)
      for (int64_t block = first; block < last; ++block)
        for (int64_t row = 0; row < rows; ++row) {
          Tile<Cell, Num, 1> tile(*this, 0, row, block);
          tile.operand(i, 0, 0, tile.previous(part, 0));
        }
  group_threads.wait(group_size);
  for (int64_t s = 0; s < T() && set_running_rows(s); ++s) {
    for (int64_t block = first; block < last; ++block) {
      multiply_before(s, block, false);
      for_tiles(rows, [&](int64_t row, auto count) {
        Cell::forward(Tile<Cell, Num, count.value>(*this, s, row, block));
      });
    }
    group_threads.wait(group_size);
    if constexpr (Cell::has_second_phase) {
      for (int64_t block = first; block < last; ++block) {
        multiply_before(s, block, true);
        for_tiles(rows, [&](int64_t row, auto count) {
          Cell::forward_second(Tile<Cell, Num, count.value>(*this, s, row, block));
        });
      }
      group_threads.wait(group_size);
    }
  }
}

// dz · W of product I for all rows and `count` blocks; Cell::add_gradient receives the sums.
template <class Cell, class Num, int I>
static void product_backward(Worker<Cell, Num>& w, int64_t s, int64_t block, int count) {
  const PackedWeights<Num>& packed = w.packed[I];
  multiply_all(w.sums[I], w.tile_rows,
               w.dz_rows(s) + Cell::products[I].gate * w.H(),
               w.dz_stride, packed.block(block), count, packed.depth);
  for (int i = 0; i < count; ++i)
    for (int64_t row = 0; row < w.rows; ++row)
      Cell::template add_gradient<I>(
          Tile<Cell, Num, 1>(w, s, row, block + i), 0,
          load(w.sums[I] + (row * count + i) * VL));
}

template <class Cell, class Num, int I>
static void all_products_backward(Worker<Cell, Num>& w, int64_t s) {
  if (Cell::products[I].needs_barrier) w.group_threads.wait(w.group_size);
  for (int64_t block = w.first; block < w.last; block += 4)
    product_backward<Cell, Num, I>(w, s, block, (int)std::min<int64_t>(4, w.last - block));
}

template <class Cell, class Num> void Worker<Cell, Num>::backward() {
  for (int64_t s = T() - 1; s >= 0; --s) {
    if (!set_running_rows(s)) continue;
    for_tiles(rows, [&](int64_t row, auto count) {
      for (int64_t block = first; block < last; ++block)
        Cell::backward(Tile<Cell, Num, count.value>(*this, s, row, block));
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
