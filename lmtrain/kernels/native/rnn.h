// a = g(z), g = tanh, or relu as the other form; see cells/rnn.py.

struct Rnn {
  static constexpr int gates = 1;
  static constexpr bool has_second_phase = false;
  static constexpr std::array<Product, 1> products = {{{0, 0, 0, 1, 0, false}}};

  template <class Num, int R> static void forward(const Tile<Rnn, Num, R>& at) {
    vec z[R][1];
    at.inputs(z, 0);
    at.template add_product<0, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec a = at.is_other() ? (z[r][0] < 0.0f ? vec{} : z[r][0]) : tanh_(z[r][0]);
      at.save_gate(r, 0, a);
      at.save_state(0, r, a);
    }
  }

  template <class Num, int R> static void backward(const Tile<Rnn, Num, R>& at) {
    for (int r = 0; r < R; ++r) {
      vec a = at.gate(r, 0), delta = at.delta(0, r) + at.grad_hidden(r);
      at.save_dz(r, 0, at.is_other() ? (a > 0.0f ? delta : vec{}) : delta * (1.0f - a * a));
    }
  }

  template <int I, class Tile> static void after(const Tile& at, int r, vec sum) {
    at.save_delta(0, r, sum);
  }
};
