// The native kernels of lmtrain: a plain C interface on raw pointers, no torch headers.
//
// table.h, with all it includes, is compiled once for each instruction set, in a namespace of its
// own; which one runs is chosen at each call. library.py calls, and says what the arguments mean.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define IS_X86
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

struct bf16 { uint16_t bits; };

// One scan over time of a cell. Num is float, or bf16 where the call is mixed. Where rows have
// lengths, what is (T, B, ...) below has a line for each row that has not ended, step after step.
extern "C" struct Arguments {
  int64_t steps, rows, units, reverse, is_other_form;
  const int64_t* offsets;   // (T + 1): the first line of each step, and their number; null: T·B
  void* gates;              // (T, B, G, H) Num: input products; the forward leaves activations
  const float* recurrent;   // (G·H, H)
  const float* peephole;    // (3·H, H), (3·H) or null
  const float* bias;        // forward: (G, H)
  float* history[2];        // (T + 1, B, H) each: the state parts
  void* hidden;             // (T, B, H) Num
  const void* grad_hidden;  // (T, B, H) Num
  void* dz;                 // (T, B, G, H) Num
  float* grad_bias;         // (G, H), added to: the sum of dz over time and rows
  float* delta[2];          // (B, H): gradient of the last state, then of the first
};

// Rows of logits that become losses and, where grad_bias is given, gradients. With log_sums the
// logits are a slice of the vocabulary: first it gives the slice's sums, then, with those over the
// whole vocabulary, its gradients.
extern "C" struct Loss {
  int64_t rows, vocab;
  void* logits;            // (rows, V) Num, without the bias; the gradient is left here
  const float* bias;       // (V)
  const int64_t* targets;  // (rows); below 0: no loss
  float* nats;             // (rows), null for a slice
  float* log_sums;         // (rows) of a slice, else null: log Σ_v e^(z_v + b_v)
  float* grad_bias;        // (V), added to; null: no gradient
  float scale;             // of the gradients
};

// A matrix of bf16, and where its transpose goes.
extern "C" struct Matrix {
  int64_t rows, columns;
  const void* from;
  void* to;
};

// Threads of one call, and the barrier they meet at.
struct alignas(64) Team {
  std::atomic<int> arrived{0};
  std::atomic<int> round{0};
  void wait(int threads) {
    if (threads == 1) return;
    int now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    // A core that is busy elsewhere must not be waited for at full speed.
    for (int spins = 0; round.load(std::memory_order_acquire) == now; ++spins) {
      if (spins >= 4000) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }
};

using RunScan = void (*)(const Arguments&, Team* teams, int id, int threads, void* space, bool is_backward);
using Bytes = int64_t (*)(const Arguments&, int threads, bool is_backward);
using RunLoss = void (*)(const Loss&, Team&, int id, int threads, float* space);
struct Engine {
  RunScan run;
  Bytes workspace;
  RunLoss cross_entropy;
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
}
#undef AMX
#undef BF16
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")
namespace avx512 {
#include "table.h"
}
#pragma GCC pop_options
#undef VL
#define VL 8
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "table.h"
}
#pragma GCC pop_options
#undef VL
#endif
#define VL 4
namespace portable {
#include "table.h"
}
#undef VL

namespace {

enum Level { PORTABLE, AVX2, AVX512, AVX512_BF16, AMX_BF16 };

#ifdef IS_X86
// Whether the processor has tile registers for bf16 and Linux lets this process use them.
bool has_tiles() {
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

Engine choose(int row, bool is_mixed, int level) {
#ifdef IS_X86
  if (is_mixed && level == AMX_BF16) return amx::engine<bf16>(row);
  if (is_mixed) return avx512_bf16::engine<bf16>(row);
  if (level >= AVX512) return avx512::engine<float>(row);
  if (level == AVX2) return avx2::engine<float>(row);
#endif
  return portable::engine<float>(row);
}

// Denormal numbers are taken for 0 in here: they cost a hundred cycles each.
struct WithoutDenormals {
#ifdef IS_X86
  unsigned before = _mm_getcsr();
  WithoutDenormals() { _mm_setcsr(before | 0x8040); }
  ~WithoutDenormals() { _mm_setcsr(before); }
#endif
};

// Memory that a thread keeps from call to call: fresh pages would cost more than small scans do.
struct Space {
  void* data = nullptr;
  int64_t size = 0;
  ~Space() { std::free(data); }
  void* of(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, size);
      if (!data) size = 0;
    }
    return data;
  }
};
thread_local Space kept;

// GOMP_parallel and omp_get_num_threads of the OpenMP that torch runs on, so that its threads are
// used rather than others beside them; null for threads of our own.
struct Threads {
  int count;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*team_size)();
};

// Calls f(id, threads) on all threads.
template <class F> void in_parallel(const Threads& threads, F f) {
  struct Job {
    F& f;
    int size;
    int (*team_size)();
    std::atomic<int> next{0};
    static void take_part(void* data) {
      Job& job = *(Job*)data;
      WithoutDenormals scope;
      // OpenMP may give fewer threads than were asked for.
      job.f(job.next.fetch_add(1), job.team_size ? job.team_size() : job.size);
    }
  };
  bool is_alone = threads.count == 1;
  Job job{f, threads.count, is_alone ? nullptr : threads.team_size};
  if (is_alone) {
    Job::take_part(&job);
  } else if (threads.parallel) {
    threads.parallel(Job::take_part, &job, threads.count, 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads.count; ++i) others.emplace_back(Job::take_part, &job);
    Job::take_part(&job);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace

// The best level of this processor.
extern "C" int lmtrain_level() {
#ifdef IS_X86
  bool is_512 = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw");
  if (is_512 && __builtin_cpu_supports("avx512bf16")) return has_tiles() ? AMX_BF16 : AVX512_BF16;
  if (is_512) return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PORTABLE;
}

// What library.py must agree with: the size of each structure, the offset of each of its fields, and
// the rows of table.h with their gates, as words NAME=NUMBER.
extern "C" const char* lmtrain_layout() {
  static const std::string text = [] {
    std::string words;
    auto add = [&](const std::string& name, int64_t number) {
      words += name + "=" + std::to_string(number) + " ";
    };
#define SIZE(S) add(#S, sizeof(S))
#define OFFSET(S, FIELD) add(#S "." #FIELD, offsetof(S, FIELD))
    SIZE(Arguments);
    OFFSET(Arguments, steps);
    OFFSET(Arguments, rows);
    OFFSET(Arguments, units);
    OFFSET(Arguments, reverse);
    OFFSET(Arguments, is_other_form);
    OFFSET(Arguments, offsets);
    OFFSET(Arguments, gates);
    OFFSET(Arguments, recurrent);
    OFFSET(Arguments, peephole);
    OFFSET(Arguments, bias);
    OFFSET(Arguments, history);
    OFFSET(Arguments, hidden);
    OFFSET(Arguments, grad_hidden);
    OFFSET(Arguments, dz);
    OFFSET(Arguments, grad_bias);
    OFFSET(Arguments, delta);
    SIZE(Loss);
    OFFSET(Loss, rows);
    OFFSET(Loss, vocab);
    OFFSET(Loss, logits);
    OFFSET(Loss, bias);
    OFFSET(Loss, targets);
    OFFSET(Loss, nats);
    OFFSET(Loss, log_sums);
    OFFSET(Loss, grad_bias);
    OFFSET(Loss, scale);
    SIZE(Matrix);
    OFFSET(Matrix, rows);
    OFFSET(Matrix, columns);
    OFFSET(Matrix, from);
    OFFSET(Matrix, to);
    SIZE(Threads);
    OFFSET(Threads, count);
    OFFSET(Threads, parallel);
    OFFSET(Threads, team_size);
#undef OFFSET
#undef SIZE
    for (const portable::Entry& entry : portable::entries<float>)
      add(std::string(entry.cell) + "/" + entry.peephole, entry.gates);
    return words;
  }();
  return text.c_str();
}

// Runs one scan over time of a row of table.h, forward or backward. Returns 0, or 1 without memory.
extern "C" int lmtrain_scan(const Arguments* arguments, int row, int is_mixed, int is_backward,
                            int level, Threads threads) {
  Engine engine = choose(row, is_mixed, level);
  void* space = kept.of(engine.workspace(*arguments, threads.count, is_backward));
  if (!space) return 1;
  std::vector<Team> groups(1 + threads.count);  // all threads, then those of each group
  in_parallel(threads, [&](int id, int size) {
    engine.run(*arguments, groups.data(), id, size, space, is_backward);
  });
  return 0;
}

// Turns logits into losses and gradients. Returns 0, or 1 without memory.
extern "C" int lmtrain_cross_entropy(const Loss* loss, int is_mixed, int level, Threads threads) {
  Engine engine = choose(0, is_mixed, level);
  float* space = (float*)kept.of(2 * threads.count * loss->vocab * sizeof(float));
  if (!space) return 1;
  Team team;
  in_parallel(threads, [&](int id, int size) {
    engine.cross_entropy(*loss, team, id, size, space);
  });
  return 0;
}

// Transposes a matrix of bf16, which the processor must have instructions for.
extern "C" void lmtrain_transpose(const Matrix* matrix, Threads threads) {
#ifdef IS_X86
  in_parallel(threads, [&](int id, int size) {
    avx512_bf16::transpose(*matrix, id, size);
  });
#endif
}
