// a = g(W_aa a′ + W_ax x + b_a), g = tanh or ReLU; see cells/rnn.py. Gates: candidate. State: a.

struct Rnn {
  static constexpr int gates = 1;
  static constexpr bool has_second_phase = false;
  static constexpr std::array<Product, 1> products = {{{0, 0, 0, 1, 0, false}}};

  template <class Num, int R> static void forward(const Tile<Rnn, Num, R>& tile) {
    vec z[R][1];
    tile.inputs(z, 0);
    tile.template add_product<0, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec a = tile.is_tanh() ? tanh_(z[r][0]) : (z[r][0] < 0.0f ? vec{} : z[r][0]);
      tile.save_gate(r, 0, a);
      tile.save_state(0, r, a);
    }
  }

  template <class Num, int R> static void backward(const Tile<Rnn, Num, R>& tile) {
    for (int r = 0; r < R; ++r) {
      vec a = tile.gate(r, 0), delta = tile.delta(0, r) + tile.grad_hidden(r);
      tile.save_dz(r, 0, tile.is_tanh() ? delta * (1.0f - a * a) : (a > 0.0f ? delta : vec{}));
    }
  }

  template <int I, class Tile> static void add_gradient(const Tile& tile, int r, vec sum) {
    tile.save_delta(0, r, sum);
  }
};
