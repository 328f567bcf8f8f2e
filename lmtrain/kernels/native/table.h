// The cells by name, in both of their forms: as registered in Python, then the options' values.
// Included once for each instruction set, inside its namespace; see native.cpp.

#include "vec.h"
#include "driver.h"
#include "rnn.h"
#include "simple_gru.h"
#include "gru.h"
#include "lstm.h"
#include "cross_entropy.h"
#include "transpose.h"

struct Entry {
  const char* names[2];
  int gates;
  RunScan run;
  Bytes workspace;
};

template <class Cell, class Num>
constexpr Entry entry(const char* name, const char* other = nullptr) {
  using W = Worker<Cell, Num>;
  return {{name, other}, Cell::gates, run<Cell, Num>, W::workspace};
}

template <class Num> static const Entry entries[] = {
    entry<Rnn, Num>("rnn tanh", "rnn relu"),
    entry<SimpleGru, Num>("simple-gru"),
    entry<Gru, Num>("gru"),
    entry<Lstm<NONE>, Num>("lstm tanh", "lstm linear"),
    entry<Lstm<FULL>, Num>("peephole-lstm tanh full", "peephole-lstm linear full"),
    entry<Lstm<DIAGONAL>, Num>("peephole-lstm tanh diagonal", "peephole-lstm linear diagonal"),
};

template <class Num> static Engine engine(int cell) {
  const Entry& e = entries<Num>[cell];
  return {e.run, e.workspace, cross_entropy<Num>};
}
