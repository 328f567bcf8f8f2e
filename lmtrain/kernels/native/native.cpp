// The native kernels of lmtrain: a C interface on raw pointers, without torch headers.
//
// table.h and the headers that it includes are compiled once for each instruction set, each time in
// another namespace; the caller selects one. library.py calls these functions and documents their
// arguments. All buffers belong to the caller, except the workspace of each thread.

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// Other compilers, and GCC before 11, which does not know AMX, compile the portable kernels only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define IS_X86
#include <cpuid.h>
#include <immintrin.h>
#endif
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct bf16 { uint16_t bits; };

// One scan of a cell over time. Num is bf16 if is_bf16, else float. With `offsets` rows are packed:
// (T, B, ...) below has one line for each row that has not ended, step by step.
extern "C" struct ScanArguments {
  int64_t steps, rows, units, reverse, is_tanh;
  const int64_t* offsets;   // (T + 1): the first line of each step, then their number; or null
  void* gates;              // (T, B, G, H) Num: input products; the forward writes activations
  const float* recurrent;   // (G·H, H)
  const float* peephole;    // (3·H, H), (3·H) or null
  const float* bias;        // forward: (G, H)
  float* history[2];        // (T + 1, B, H) each: the parts of the state
  void* hidden;             // (T, B, H) Num
  const void* grad_hidden;  // (T, B, H) Num
  void* dz;                 // (T, B, G, H) Num
  float* grad_bias;         // (G, H), added to: the sum of dz over time and rows
  float* grad_state[2];     // (B, H): gradient of the final state, then of the initial state
};

// Losses of rows of logits and, with grad_bias, their gradients. With log_sums the logits are a
// slice of the vocabulary: a call without grad_bias writes log_sums of the slice, a call with grad_bias
// reads log_sums of the whole vocabulary and computes the gradients of the slice.
extern "C" struct CrossEntropyArguments {
  int64_t rows, vocab_size;
  void* logits;            // (rows, V) Num, without the bias; overwritten with the gradient
  const float* bias;       // (V)
  const int64_t* targets;  // (rows); below 0: no loss
  float* losses;           // (rows); null for a slice
  float* log_sums;         // (rows) for a slice, else null: log Σ_v e^(z_v + b_v)
  float* grad_bias;        // (V), added to; null: no gradient
  float scale;             // factor of the gradients
};

// out = left · right: (rows, depth) · (depth, columns), out contiguous. Each is bf16 or float. If
// `left` is bf16 (AMX only), `right` is rounded to bf16, and both are contiguous in one direction;
// else all are float. With `is_set_fixed` no lower instruction set is used, even if it is faster.
extern "C" struct ProductArguments {
  int64_t rows, columns, depth, is_left_bf16, is_right_bf16, is_out_bf16, is_set_fixed;
  const void *left, *right;
  int64_t left_strides[2], right_strides[2];
  void* out;
};

static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The part of a product that thread `id` computes. The threads form a grid over rows and columns:
// the one with which they pack the fewest elements.
struct ProductPart {
  int64_t first_row, last_row, first_column, last_column;
  ProductPart(const ProductArguments& a, int64_t row_multiple, int64_t column_multiple, int id,
              int threads) {
    int64_t row_parts = 1;
    for (int64_t each = 2; each <= threads; ++each)
      if (threads % each == 0 && each * a.columns + threads / each * a.rows <
                                     row_parts * a.columns + threads / row_parts * a.rows)
        row_parts = each;
    const int64_t column_parts = threads / row_parts;
    const int64_t row = id % row_parts, column = id / row_parts;
    auto bound = [](int64_t size, int64_t multiple, int64_t part, int64_t parts) {
      return std::min(size, round_up(size * part / parts, multiple));
    };
    first_row = bound(a.rows, row_multiple, row, row_parts);
    last_row = bound(a.rows, row_multiple, row + 1, row_parts);
    first_column = bound(a.columns, column_multiple, column, column_parts);
    last_column = bound(a.columns, column_multiple, column + 1, column_parts);
  }
};

// outputs = factor · inputs, or 0 where the hash of the seed and the index in the mask is below
// `dropped`. The index of element i is i mod mask_size.
extern "C" struct DropoutArguments {
  int64_t size, mask_size, seed, dropped;
  const void* inputs;  // (size) Num
  void* outputs;       // (size) Num
  float factor;
};

// A barrier for the threads of one call. A thread that waits spins for a fraction of a millisecond,
// since waking takes long, and then sleeps, so that its core is free for the thread that is missing.
struct alignas(64) Barrier {
  static constexpr int SPINS = 4000;
  std::atomic<int> arrived{0}, round{0}, sleepers{0};
  void wait(int threads) {
    if (threads == 1) return;
    int now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      // With the order of sleep(): either this sees the sleeper or the sleeper sees the round.
      round.store(now + 1, std::memory_order_seq_cst);
      if (sleepers.load(std::memory_order_seq_cst)) wake();
      return;
    }
    for (int spins = 0; spins < SPINS; ++spins) {
      if (round.load(std::memory_order_acquire) != now) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (round.load(std::memory_order_seq_cst) == now) sleep(now);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
#ifdef __linux__
  // Sleeps until wake(), unless the round has ended.
  void sleep(int now) { syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int) { std::this_thread::yield(); }
  void wake() {}
#endif
};

using RunScan = void (*)(const ScanArguments&, Barrier* barriers, int id, int threads,
                         void* workspace, bool is_backward);
using WorkspaceBytes = int64_t (*)(const ScanArguments&, int threads, bool is_backward);
using RunCrossEntropy = void (*)(const CrossEntropyArguments&, Barrier&, int id, int threads,
                                 float* workspace);
using RunDropout = void (*)(const DropoutArguments&, int id, int threads);
struct Kernels {
  RunScan run;
  WorkspaceBytes workspace;
  RunCrossEntropy cross_entropy;
  RunDropout dropout;
};

struct ProductKernels {
  void (*product)(const ProductArguments&, int id, int threads, char* workspace);
  int64_t (*workspace)();  // bytes for each thread
};

#ifdef IS_X86
#define VL 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")
#define BF16
namespace avx512_bf16 {
#include "table.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2,amx-tile,amx-bf16")
#define AMX
namespace amx {
#include "table.h"
#include "amx_product.h"
}
#undef AMX
#undef BF16
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")
namespace avx512 {
#include "table.h"
#include "product.h"
}
#pragma GCC pop_options
#undef VL
#define VL 8
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "table.h"
#include "product.h"
}
#pragma GCC pop_options
#undef VL
#endif
#define VL 4
namespace portable {
#include "table.h"
#include "product.h"
}
#undef VL

namespace {

enum InstructionSet { PORTABLE, AVX2, AVX512, AVX512_BF16, AMX_BF16 };

#ifdef IS_X86
// Whether the CPU has AMX tile registers for bf16 and Linux permits this process to use them.
bool has_amx() {
#ifdef __linux__
  constexpr unsigned AMX_BF16_BIT = 1u << 22, AMX_TILE_BIT = 1u << 24;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & AMX_BF16_BIT) || !(d & AMX_TILE_BIT)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

Kernels select_kernels(int cell, bool is_bf16, int instruction_set) {
#ifdef IS_X86
  if (is_bf16 && instruction_set == AMX_BF16) return amx::kernels<bf16>(cell);
  if (is_bf16) return avx512_bf16::kernels<bf16>(cell);
  if (instruction_set >= AVX512) return avx512::kernels<float>(cell);
  if (instruction_set == AVX2) return avx2::kernels<float>(cell);
#endif
  return portable::kernels<float>(cell);
}

ProductKernels select_product(bool is_bf16, int instruction_set) {
#ifdef IS_X86
  if (is_bf16) return {amx::bf16_product, amx::bf16_product_workspace};
  if (instruction_set >= AVX512) return {avx512::product, avx512::product_workspace};
  if (instruction_set == AVX2) return {avx2::product, avx2::product_workspace};
#endif
  return {portable::product, portable::product_workspace};
}

// The fastest instruction set for a product, at most the given one. Zen 4, of family 19h, executes
// AVX512 in halves and is faster with AVX2, except for inner products.
int fastest_for(const ProductArguments& a, int instruction_set) {
#ifdef IS_X86
  if (instruction_set > AVX2 && __builtin_cpu_is("amdfam19h") && !avx512::is_unpacked(a))
    return AVX2;
#endif
  return instruction_set;
}

// Flushes denormals to zero in its scope: each would cost a hundred cycles.
struct FlushDenormals {
#ifdef IS_X86
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// The workspace of the calling thread, reused by later calls: page faults of a new allocation take
// longer than a small scan.
struct Workspace {
  void* data = nullptr;
  int64_t size = 0;
  ~Workspace() { std::free(data); }
  // At least this many bytes; null if there is no memory.
  void* reserve(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, size);
      if (!data) size = 0;
    }
    return data;
  }
};
thread_local Workspace workspace;

// The number of threads, and GOMP_parallel and omp_get_num_threads of the OpenMP runtime of torch,
// whose threads are reused. If these are null, std::thread is used.
struct ThreadPool {
  int count;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*num_threads)();
};

// Multiply-adds of a product from which on several threads are worth waking.
constexpr int64_t MIN_PARALLEL_PRODUCT = 1 << 16;
// Elements of dropout from which on several threads are worth waking.
constexpr int64_t MIN_PARALLEL_DROPOUT = 1 << 15;

// Calls f(id, threads) on all threads of a pool.
template <class F> void run_parallel(const ThreadPool& pool, F f) {
  struct Job {
    F& f;
    int size;
    int (*num_threads)();
    std::atomic<int> next{0};
    static void work(void* data) {
      Job& job = *(Job*)data;
      FlushDenormals scope;
      // OpenMP may provide fewer threads than requested.
      job.f(job.next.fetch_add(1), job.num_threads ? job.num_threads() : job.size);
    }
  };
  bool is_single = pool.count == 1;
  Job job{f, pool.count, is_single ? nullptr : pool.num_threads};
  if (is_single) {
    Job::work(&job);
  } else if (pool.parallel) {
    pool.parallel(Job::work, &job, pool.count, 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < pool.count; ++i) others.emplace_back(Job::work, &job);
    Job::work(&job);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace

// The best instruction set of this CPU.
extern "C" int lmtrain_instruction_set() {
#ifdef IS_X86
  bool is_512 = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw");
  if (is_512 && __builtin_cpu_supports("avx512bf16")) return has_amx() ? AMX_BF16 : AVX512_BF16;
  if (is_512) return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PORTABLE;
}

// Whether this is an AMD CPU.
extern "C" int lmtrain_is_amd() {
#ifdef IS_X86
  return __builtin_cpu_is("amd");
#else
  return 0;
#endif
}

// For comparison with library.py: the size of each structure, the offset of each field, and the
// cells of table.h with their number of gates, as words NAME=NUMBER.
extern "C" const char* lmtrain_abi() {
  static const std::string text = [] {
    std::string words;
    auto add = [&](const std::string& name, int64_t number) {
      words += name + "=" + std::to_string(number) + " ";
    };
#define SIZE(S) add(#S, sizeof(S))
#define OFFSET(S, FIELD) add(#S "." #FIELD, offsetof(S, FIELD))
    SIZE(ScanArguments);
    OFFSET(ScanArguments, steps);
    OFFSET(ScanArguments, rows);
    OFFSET(ScanArguments, units);
    OFFSET(ScanArguments, reverse);
    OFFSET(ScanArguments, is_tanh);
    OFFSET(ScanArguments, offsets);
    OFFSET(ScanArguments, gates);
    OFFSET(ScanArguments, recurrent);
    OFFSET(ScanArguments, peephole);
    OFFSET(ScanArguments, bias);
    OFFSET(ScanArguments, history);
    OFFSET(ScanArguments, hidden);
    OFFSET(ScanArguments, grad_hidden);
    OFFSET(ScanArguments, dz);
    OFFSET(ScanArguments, grad_bias);
    OFFSET(ScanArguments, grad_state);
    SIZE(CrossEntropyArguments);
    OFFSET(CrossEntropyArguments, rows);
    OFFSET(CrossEntropyArguments, vocab_size);
    OFFSET(CrossEntropyArguments, logits);
    OFFSET(CrossEntropyArguments, bias);
    OFFSET(CrossEntropyArguments, targets);
    OFFSET(CrossEntropyArguments, losses);
    OFFSET(CrossEntropyArguments, log_sums);
    OFFSET(CrossEntropyArguments, grad_bias);
    OFFSET(CrossEntropyArguments, scale);
    SIZE(ProductArguments);
    OFFSET(ProductArguments, rows);
    OFFSET(ProductArguments, columns);
    OFFSET(ProductArguments, depth);
    OFFSET(ProductArguments, is_left_bf16);
    OFFSET(ProductArguments, is_right_bf16);
    OFFSET(ProductArguments, is_out_bf16);
    OFFSET(ProductArguments, is_set_fixed);
    OFFSET(ProductArguments, left);
    OFFSET(ProductArguments, right);
    OFFSET(ProductArguments, left_strides);
    OFFSET(ProductArguments, right_strides);
    OFFSET(ProductArguments, out);
    SIZE(DropoutArguments);
    OFFSET(DropoutArguments, size);
    OFFSET(DropoutArguments, mask_size);
    OFFSET(DropoutArguments, seed);
    OFFSET(DropoutArguments, dropped);
    OFFSET(DropoutArguments, inputs);
    OFFSET(DropoutArguments, outputs);
    OFFSET(DropoutArguments, factor);
    SIZE(ThreadPool);
    OFFSET(ThreadPool, count);
    OFFSET(ThreadPool, parallel);
    OFFSET(ThreadPool, num_threads);
#undef OFFSET
#undef SIZE
    for (const portable::Entry& entry : portable::entries<float>)
      add(std::string(entry.cell) + "/" + entry.peephole, entry.gates);
    return words;
  }();
  return text.c_str();
}

// Runs one scan of a cell of table.h, forward or backward. Returns 0, or 1 if there is no memory.
extern "C" int lmtrain_scan(const ScanArguments* arguments, int cell, int is_bf16, int is_backward,
                            int instruction_set, ThreadPool pool) {
  Kernels kernels = select_kernels(cell, is_bf16, instruction_set);
  void* memory = workspace.reserve(kernels.workspace(*arguments, pool.count, is_backward));
  if (!memory) return 1;
  std::vector<Barrier> barriers(1 + pool.count);  // of all threads, then of each group
  run_parallel(pool, [&](int id, int threads) {
    kernels.run(*arguments, barriers.data(), id, threads, memory, is_backward);
  });
  return 0;
}

// Computes losses and gradients of rows of logits. Returns 0, or 1 if there is no memory.
extern "C" int lmtrain_cross_entropy(const CrossEntropyArguments* arguments, int is_bf16,
                                     int instruction_set, ThreadPool pool) {
  Kernels kernels = select_kernels(0, is_bf16, instruction_set);
  float* memory =
      (float*)workspace.reserve(2 * pool.count * arguments->vocab_size * sizeof(float));
  if (!memory) return 1;
  Barrier barrier;
  run_parallel(pool, [&](int id, int threads) {
    kernels.cross_entropy(*arguments, barrier, id, threads, memory);
  });
  return 0;
}

// Zeroes elements at random and scales the others.
extern "C" void lmtrain_dropout(const DropoutArguments* arguments, int is_bf16, int instruction_set,
                                ThreadPool pool) {
  Kernels kernels = select_kernels(0, is_bf16, instruction_set);
  if (arguments->size < MIN_PARALLEL_DROPOUT) pool.count = 1;
  run_parallel(pool, [&](int id, int threads) { kernels.dropout(*arguments, id, threads); });
}

// Multiplies matrices. Returns 0, or 1 if there is no memory.
extern "C" int lmtrain_product(const ProductArguments* arguments, int instruction_set,
                               ThreadPool pool) {
  if (!arguments->is_set_fixed) instruction_set = fastest_for(*arguments, instruction_set);
  ProductKernels kernels = select_product(arguments->is_left_bf16, instruction_set);
  if (arguments->rows * arguments->columns * arguments->depth < MIN_PARALLEL_PRODUCT)
    pool.count = 1;
  char* memory = (char*)workspace.reserve(pool.count * kernels.workspace());
  if (!memory) return 1;
  run_parallel(pool, [&](int id, int threads) {
    kernels.product(*arguments, id, threads, memory);
  });
  return 0;
}

// Runs rounds of independent multiply-adds on all threads, for the highest rate of this CPU.
// Returns the number of FLOP.
extern "C" int64_t lmtrain_multiply_adds(int64_t rounds, int instruction_set, ThreadPool pool) {
  auto multiply_adds = portable::multiply_adds;
#ifdef IS_X86
  if (instruction_set == AVX2) multiply_adds = avx2::multiply_adds;
  if (instruction_set >= AVX512) multiply_adds = avx512::multiply_adds;
#endif
  std::atomic<int64_t> count{0};
  run_parallel(pool, [&](int, int) {
    float result = 0.5f;
    count += multiply_adds(rounds, &result);
    // Never true, but the compiler does not know.
    if (result < 0) count = 0;
  });
  return count;
}
