// c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/simple_gru.py. Gates: candidate, update. State: c.

struct SimpleGru {
  static constexpr int gates = 2;
  static constexpr bool has_second_phase = false;
  static constexpr std::array<Product, 1> products = {{{0, 0, 0, 2, 0, false}}};

  template <class Num, int R> static void forward(const Tile<SimpleGru, Num, R>& tile) {
    vec z[R][2];
    tile.inputs(z, 0);
    tile.template add_product<0, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec candidate = tanh_(z[r][0]), update = sigmoid(z[r][1]), c = tile.previous(0, r);
      tile.save_gate(r, 0, candidate);
      tile.save_gate(r, 1, update);
      tile.save_state(0, r, c + update * (candidate - c));
    }
  }

  template <class Num, int R> static void backward(const Tile<SimpleGru, Num, R>& tile) {
    for (int r = 0; r < R; ++r) {
      vec candidate = tile.gate(r, 0), update = tile.gate(r, 1), keep = 1.0f - update;
      vec delta = tile.delta(0, r) + tile.grad_hidden(r);
      tile.save_dz(r, 0, delta * update * (1.0f - candidate * candidate));
      tile.save_dz(r, 1, delta * (candidate - tile.previous(0, r)) * update * keep);
      tile.save_delta(0, r, delta * keep);
    }
  }

  template <int I, class Tile> static void add_gradient(const Tile& tile, int r, vec sum) {
    tile.save_delta(0, r, tile.delta(0, r) + sum);
  }
};
