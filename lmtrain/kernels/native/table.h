// The cells, by the name and the peephole form of their variants in ../variant.py.
// Included once for each instruction set, inside its namespace; see native.cpp.

#include "vec.h"
#include "packed.h"
#include "driver.h"
#include "rnn.h"
#include "simple_gru.h"
#include "gru.h"
#include "lstm.h"
#include "cross_entropy.h"
#include "dropout.h"

struct Entry {
  const char* cell;
  const char* peephole;
  int gates;
  RunScan run;
  WorkspaceBytes workspace;
};

template <class Cell, class Num>
constexpr Entry entry(const char* cell, const char* peephole = "none") {
  using W = Worker<Cell, Num>;
  return {cell, peephole, Cell::gates, run<Cell, Num>, W::workspace};
}

template <class Num> static const Entry entries[] = {
    entry<Rnn, Num>("rnn"),
    entry<SimpleGru, Num>("simple-gru"),
    entry<Gru, Num>("gru"),
    entry<Lstm<NONE>, Num>("lstm"),
    entry<Lstm<FULL>, Num>("peephole-lstm", "full"),
    entry<Lstm<DIAGONAL>, Num>("peephole-lstm", "diagonal"),
};

template <class Num> static Kernels kernels(int cell) {
  const Entry& e = entries<Num>[cell];
  return {e.run, e.workspace, cross_entropy<Num>, dropout<Num>};
}
