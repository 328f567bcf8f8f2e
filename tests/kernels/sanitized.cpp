// Runs every kernel at odd sizes, with buffers of the exact size, under the compiler's sanitizers.

#include "native.cpp"

#include <cstdio>
#include <random>

static std::mt19937 random_bits(1);

static std::vector<char> random_buffer(int64_t count, bool is_bf16) {
  std::vector<char> bytes(count * (is_bf16 ? 2 : 4));
  for (int64_t i = 0; i < count; ++i) {
    float x = (float)(random_bits() % 2001) / 1000 - 1;
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

static int calls = 0;

// Frees the workspace, so that each call allocates one of the exact size.
static void free_workspace() {
  std::free(workspace.data);
  workspace.data = nullptr;
  workspace.size = 0;
}

static void scan(int cell, int64_t steps, int64_t rows, int64_t units, int instruction_set,
                 bool is_bf16, int threads, bool reverse, bool has_lengths) {
  const portable::Entry& entry = portable::entries<float>[cell];
  int gates = entry.gates;
  int64_t state = rows * units;
  int64_t peephole_size = !std::strcmp(entry.peephole, "full") ? 3 * units * units
                          : !std::strcmp(entry.peephole, "diagonal") ? 3 * units : 0;
  // With lengths, a third of the rows ends after each step, and the packed buffers are shorter.
  std::vector<int64_t> offsets{0};
  for (int64_t t = 0; t < steps; ++t)
    offsets.push_back(offsets.back() +
                      (has_lengths ? std::max<int64_t>(1, rows - t * rows / 3) : rows));
  int64_t lines = offsets.back() * units;
  auto z = random_buffer(lines * gates, is_bf16), dz = z;
  auto recurrent = random_buffer(gates * units * units, false);
  auto peephole = random_buffer(peephole_size, false);
  std::vector<char> history[2] = {random_buffer(state + lines, false),
                                  random_buffer(state + lines, false)};
  std::vector<char> grad_state[2] = {random_buffer(state, false), random_buffer(state, false)};
  auto bias = random_buffer(gates * units, false), grad_bias = bias;
  auto hidden = random_buffer(lines, is_bf16);
  ScanArguments arguments{
      steps, rows, units, reverse && !has_lengths, steps % 2,
      has_lengths ? offsets.data() : nullptr, z.data(), (float*)recurrent.data(),
      (float*)peephole.data(), (float*)bias.data(),
      {(float*)history[0].data(), (float*)history[1].data()},
      hidden.data(), hidden.data(), dz.data(), (float*)grad_bias.data(),
      {(float*)grad_state[0].data(), (float*)grad_state[1].data()}};
  for (int is_backward : {0, 1}) {
    free_workspace();
    lmtrain_scan(&arguments, cell, is_bf16, is_backward, instruction_set,
                 {threads, nullptr, nullptr});
    ++calls;
  }
}

static void cross_entropy(int64_t rows, int64_t vocab_size, int instruction_set, bool is_bf16,
                          int threads) {
  auto logits = random_buffer(rows * vocab_size, is_bf16), bias = random_buffer(vocab_size, false);
  auto grad_bias = random_buffer(vocab_size, false), losses = random_buffer(rows, false);
  std::vector<int64_t> targets(rows);
  for (int64_t& target : targets) target = (int64_t)(random_bits() % (vocab_size + 1)) - 1;
  auto log_sums = random_buffer(rows, false);
  for (float* gradient : {(float*)nullptr, (float*)grad_bias.data()})
    for (float* sums : {(float*)nullptr, (float*)log_sums.data()}) {
      free_workspace();
      CrossEntropyArguments arguments{
          rows, vocab_size, logits.data(), (float*)bias.data(), targets.data(),
          (float*)losses.data(), sums, gradient, 0.5f};
      lmtrain_cross_entropy(&arguments, is_bf16, instruction_set, {threads, nullptr, nullptr});
      ++calls;
    }
}

static void product(int64_t rows, int64_t depth, int64_t columns, bool is_left_transposed,
                    bool is_right_transposed, int instruction_set, bool is_bf16, int threads) {
  auto left = random_buffer(rows * depth, is_bf16), right = random_buffer(depth * columns, is_bf16);
  auto out = random_buffer(rows * columns, is_bf16);
  ProductArguments arguments{rows, columns, depth, is_bf16, is_bf16, is_bf16, 1, left.data(),
                             right.data(), {depth, 1}, {columns, 1}, out.data()};
  if (is_left_transposed) {
    arguments.left_strides[0] = 1;
    arguments.left_strides[1] = rows;
  }
  if (is_right_transposed) {
    arguments.right_strides[0] = 1;
    arguments.right_strides[1] = depth;
  }
  free_workspace();
  lmtrain_product(&arguments, instruction_set, {threads, nullptr, nullptr});
  ++calls;
}

static void dropout(int64_t mask_size, int instruction_set, bool is_bf16, int threads) {
  const int64_t size = 3 * mask_size;
  auto inputs = random_buffer(size, is_bf16), outputs = random_buffer(size, is_bf16);
  DropoutArguments arguments{size, mask_size, -5, 1 << 30, inputs.data(), outputs.data(), 1.5f};
  lmtrain_dropout(&arguments, is_bf16, instruction_set, {threads, nullptr, nullptr});
  ++calls;
}

int main() {
  for (int instruction_set = 0; instruction_set <= lmtrain_instruction_set(); ++instruction_set)
    for (bool is_bf16 : {false, true}) {
      if (is_bf16 && instruction_set < AVX512_BF16) continue;
      for (int threads : {1, 2, 3}) {
        for (int cell = 0; cell < 6; ++cell)
          for (int64_t units : {1, 7, 17, 65})
            for (int64_t rows : {1, 3, 13})
              for (bool has_lengths : {false, true})
                scan(cell, 1 + rows % 3, rows, units, instruction_set, is_bf16, threads, units % 2,
                     has_lengths);
        for (int64_t vocab_size : {1, 7, 16, 33})
          for (int64_t rows : {1, 5})
            cross_entropy(rows, vocab_size, instruction_set, is_bf16, threads);
        for (int64_t mask_size : {1, 15, 33, 20000})
          dropout(mask_size, instruction_set, is_bf16, threads);
        // bf16 matrices are multiplied with AMX only.
        if (is_bf16 && instruction_set < AMX_BF16) continue;
        for (int64_t rows : {1, 13, 35})
          for (int64_t depth : {0, 1, 385})
            for (int64_t columns : {1, 33})
              for (bool is_left_transposed : {false, true})
                for (bool is_right_transposed : {false, true})
                  product(rows, depth, columns, is_left_transposed, is_right_transposed,
                          instruction_set, is_bf16, threads);
      }
    }
  std::printf("%d calls\n", calls);
}
