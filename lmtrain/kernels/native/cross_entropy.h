// Softmax cross-entropy of rows of logits, and its gradient in their place; see cross_entropy.py.
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

// One row. `powers` is scratch of `vocab` floats; `grad_bias` is added to.
template <class Num>
static void cross_entropy_row(const Loss& a, int64_t row, float* powers, float* grad_bias) {
  const int64_t V = a.vocab, target = a.targets[row];
  Num* logits = (Num*)a.logits + row * V;
  if (target < 0) {
    a.nats[row] = 0;
    if (grad_bias) std::fill(logits, logits + V, Num{});
    return;
  }
  vec largest = splat(-std::numeric_limits<float>::infinity());
  int64_t whole = V / VL * VL;
  auto score = [&](int64_t v, int n) { return load(logits + v, n) + load(a.bias + v, n); };
  for (int64_t v = 0; v < whole; v += VL) {
    vec z = score(v, VL);
    store(powers + v, z, VL);
    largest = z > largest ? z : largest;
  }
  float most = largest_of(largest);
  if (int n = (int)(V - whole)) {
    store(powers + whole, score(whole, n), n);
    for (int i = 0; i < n; ++i) most = std::max(most, powers[whole + i]);
  }
  float score_of_target = powers[target];
  vec sums{};
  for (int64_t v = 0; v < whole; v += VL) {
    vec power = exp_(load(powers + v, VL) - most);
    store(powers + v, power, VL);
    sums += power;
  }
  float sum = sum_of(sums);
  if (int n = (int)(V - whole)) {
    store(powers + whole, exp_(load(powers + whole, n) - most), n);
    for (int i = 0; i < n; ++i) sum += powers[whole + i];
  }
  a.nats[row] = most + std::log(sum) - score_of_target;
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

// The rows of thread `id`; space holds 2·vocab floats a thread, then the threads' bias gradients
// are added up in their order.
template <class Num> static void cross_entropy(const Loss& a, Team& team, int id, int threads,
                                               float* space) {
  float* powers = space + 2 * id * a.vocab;
  float* grad_bias = a.grad_bias ? powers + a.vocab : nullptr;
  if (grad_bias) std::fill(grad_bias, grad_bias + a.vocab, 0.0f);
  for (int64_t row = a.rows * id / threads; row < a.rows * (id + 1) / threads; ++row)
    cross_entropy_row<Num>(a, row, powers, grad_bias);
  if (!grad_bias) return;
  team.wait(threads);
  for (int64_t v = a.vocab * id / threads; v < a.vocab * (id + 1) / threads; ++v)
    for (int other = 0; other < threads; ++other)
      a.grad_bias[v] += space[(2 * other + 1) * a.vocab + v];
}
