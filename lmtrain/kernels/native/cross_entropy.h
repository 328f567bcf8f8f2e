// Softmax cross-entropy of rows of logits, which its gradient overwrites; see cross_entropy.py.
//
//   L = log Σ_v e^(z_v + b_v) − (z_y + b_y),   dz_v = scale · (softmax(z + b)_v − [v = y])

static inline float sum_of(vec v) {
  float sum = 0;
  for (int i = 0; i < VL; ++i) sum += v[i];
  return sum;
}

static inline float largest_of(vec v) {
  float largest = v[0];
  for (int i = 1; i < VL; ++i) largest = std::max(largest, v[i]);
  return largest;
}

// powers = e^(score - max), with score = logit + bias of one row and its maximum. Returns the sum.
template <class Num>
static float exponentiate(const Num* logits, const float* bias, int64_t V, float* powers,
                          float& max) {
  vec largest = splat(-std::numeric_limits<float>::infinity());
  int64_t whole = V / VL * VL;
  int rest = (int)(V - whole);
  for (int64_t v = 0; v < whole; v += VL) {
    vec z = load(logits + v, VL) + load(bias + v, VL);
    store(powers + v, z, VL);
    largest = z > largest ? z : largest;
  }
  store(powers + whole, load(logits + whole, rest) + load(bias + whole, rest), rest);
  max = largest_of(largest);
  for (int i = 0; i < rest; ++i) max = std::max(max, powers[whole + i]);
  vec sums{};
  for (int64_t v = 0; v < whole; v += VL) {
    vec power = exp_(load(powers + v, VL) - max);
    store(powers + v, power, VL);
    sums += power;
  }
  float sum = sum_of(sums);
  store(powers + whole, exp_(load(powers + whole, rest) - max), rest);
  for (int i = 0; i < rest; ++i) sum += powers[whole + i];
  return sum;
}

// One row of a slice of the vocabulary: without grad_bias, log Σ e^score over the slice; with it,
// the gradient from log Σ e^score over the whole vocabulary.
template <class Num>
static void slice_row(const CrossEntropyArguments& a, int64_t row, float* powers,
                      float* grad_bias) {
  const int64_t V = a.vocab_size, target = a.targets[row];
  Num* logits = (Num*)a.logits + row * V;
  if (!grad_bias) {
    float max, sum = exponentiate(logits, a.bias, V, powers, max);
    a.log_sums[row] = max + std::log(sum);
    return;
  }
  if (std::isinf(a.log_sums[row])) {  // no target
    std::fill(logits, logits + V, Num{});
    return;
  }
  for (int64_t v = 0; v < V; v += VL) {
    int n = (int)std::min<int64_t>(VL, V - v);
    vec z = load(logits + v, n) + load(a.bias + v, n);
    store(powers + v, exp_(z - a.log_sums[row]) * a.scale, n);
  }
  if (0 <= target && target < V) powers[target] -= a.scale;
  for (int64_t v = 0; v < V; v += VL) {
    int n = (int)std::min<int64_t>(VL, V - v);
    vec dz = load(powers + v, n);
    store(logits + v, dz, n);
    store(grad_bias + v, load(grad_bias + v, n) + dz, n);
  }
}

// One row of the whole vocabulary. `powers` is scratch memory of V floats; `grad_bias` is added to.
template <class Num>
static void whole_row(const CrossEntropyArguments& a, int64_t row, float* powers,
                      float* grad_bias) {
  const int64_t V = a.vocab_size, target = a.targets[row];
  Num* logits = (Num*)a.logits + row * V;
  if (target < 0) {
    a.losses[row] = 0;
    if (grad_bias) std::fill(logits, logits + V, Num{});
    return;
  }
  float score = load(logits + target, 1)[0] + a.bias[target];
  float max, sum = exponentiate(logits, a.bias, V, powers, max);
  a.losses[row] = max + std::log(sum) - score;
  if (!grad_bias) return;
  float factor = a.scale / sum;
  powers[target] -= sum;
  for (int64_t v = 0; v < V; v += VL) {
    int n = (int)std::min<int64_t>(VL, V - v);
    vec dz = load(powers + v, n) * factor;
    store(logits + v, dz, n);
    store(grad_bias + v, load(grad_bias + v, n) + dz, n);
  }
}

// Computes the rows of thread `id`. `workspace` has 2·V floats per thread: powers, and a gradient
// of the bias; these gradients are then added in the order of the threads.
template <class Num> static void cross_entropy(const CrossEntropyArguments& a, Barrier& barrier,
                                               int id, int threads, float* workspace) {
  float* powers = workspace + 2 * id * a.vocab_size;
  float* grad_bias = a.grad_bias ? powers + a.vocab_size : nullptr;
  if (grad_bias) std::fill(grad_bias, grad_bias + a.vocab_size, 0.0f);
  for (int64_t row = a.rows * id / threads; row < a.rows * (id + 1) / threads; ++row)
    a.log_sums ? slice_row<Num>(a, row, powers, grad_bias)
               : whole_row<Num>(a, row, powers, grad_bias);
  if (!grad_bias) return;
  barrier.wait(threads);
  for (int64_t v = a.vocab_size * id / threads; v < a.vocab_size * (id + 1) / threads; ++v)
    for (int other = 0; other < threads; ++other)
      a.grad_bias[v] += workspace[(2 * other + 1) * a.vocab_size + v];
}
