// Every cell at odd sizes on memory of exactly the size it needs, for the sanitizers of a compiler.

#include "native.cpp"

#include <cstdio>
#include <random>

static std::mt19937 chance(1);

static std::vector<char> numbers(int64_t count, bool is_bf16) {
  std::vector<char> bytes(count * (is_bf16 ? 2 : 4));
  for (int64_t i = 0; i < count; ++i) {
    float x = (float)(chance() % 2001) / 1000 - 1;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half = bits >> 16;
    if (is_bf16)
      std::memcpy(&bytes[2 * i], &half, 2);
    else
      std::memcpy(&bytes[4 * i], &x, 4);
  }
  return bytes;
}

static int scans = 0;

// Each call gets memory of its own size, so that a step beyond it is seen.
static void forget_space() {
  std::free(kept.data);
  kept.data = nullptr;
  kept.size = 0;
}

static void scan(int row, int64_t steps, int64_t rows, int64_t units, int level, bool is_mixed,
                 int threads, bool reverse, bool has_lengths) {
  const portable::Entry& entry = portable::entries<float>[row];
  int gates = entry.gates;
  int64_t state = rows * units;
  int64_t see = !std::strcmp(entry.peephole, "full") ? 3 * units * units
                : !std::strcmp(entry.peephole, "diagonal") ? 3 * units : 0;
  // With lengths, a third of the rows ends at each step but the last, and all memory is shorter.
  std::vector<int64_t> offsets{0};
  for (int64_t t = 0; t < steps; ++t)
    offsets.push_back(offsets.back() + (has_lengths ? std::max<int64_t>(1, rows - t * rows / 3) : rows));
  int64_t lines = offsets.back() * units;
  auto z = numbers(lines * gates, is_mixed), dz = z;
  auto recurrent = numbers(gates * units * units, false), peephole = numbers(see, false);
  std::vector<char> history[2] = {numbers(state + lines, false), numbers(state + lines, false)};
  std::vector<char> delta[2] = {numbers(state, false), numbers(state, false)};
  auto bias = numbers(gates * units, false), grad_bias = bias;
  auto hidden = numbers(lines, is_mixed);
  Arguments a{steps, rows, units, reverse && !has_lengths, steps % 2,
              has_lengths ? offsets.data() : nullptr, z.data(), (float*)recurrent.data(),
              (float*)peephole.data(), (float*)bias.data(),
              {(float*)history[0].data(), (float*)history[1].data()},
              hidden.data(), hidden.data(), dz.data(), (float*)grad_bias.data(),
              {(float*)delta[0].data(), (float*)delta[1].data()}};
  for (int is_backward : {0, 1}) {
    forget_space();
    lmtrain_scan(&a, row, is_mixed, is_backward, level, {threads, nullptr, nullptr});
    ++scans;
  }
}

static void cross_entropy(int64_t rows, int64_t vocab, int level, bool is_mixed, int threads) {
  auto logits = numbers(rows * vocab, is_mixed), bias = numbers(vocab, false);
  auto grad_bias = numbers(vocab, false), nats = numbers(rows, false);
  std::vector<int64_t> targets(rows);
  for (int64_t& target : targets) target = (int64_t)(chance() % (vocab + 1)) - 1;
  auto log_sums = numbers(rows, false);
  for (float* gradient : {(float*)nullptr, (float*)grad_bias.data()})
    for (float* sums : {(float*)nullptr, (float*)log_sums.data()}) {
      forget_space();
      Loss loss{rows, vocab, logits.data(), (float*)bias.data(), targets.data(),
                (float*)nats.data(), sums, gradient, 0.5f};
      lmtrain_cross_entropy(&loss, is_mixed, level, {threads, nullptr, nullptr});
      ++scans;
    }
}

int main() {
  for (int level = 0; level <= lmtrain_level(); ++level)
    for (bool is_mixed : {false, true}) {
      if (is_mixed && level < AVX512_BF16) continue;
      for (int threads : {1, 2, 3}) {
        for (int row = 0; row < 6; ++row)
          for (int64_t units : {1, 7, 17, 65})
            for (int64_t rows : {1, 3, 13})
              for (bool has_lengths : {false, true})
                scan(row, 1 + rows % 3, rows, units, level, is_mixed, threads, units % 2,
                     has_lengths);
        for (int64_t vocab : {1, 7, 16, 33})
          for (int64_t rows : {1, 5}) cross_entropy(rows, vocab, level, is_mixed, threads);
      }
    }
  std::printf("%d scans\n", scans);
}
