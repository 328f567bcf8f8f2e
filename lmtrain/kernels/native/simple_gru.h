// c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/simple_gru.py. Gates: candidate, update.

struct SimpleGru {
  static constexpr int gates = 2;
  static constexpr bool has_second_phase = false;
  static constexpr std::array<Product, 1> products = {{{0, 0, 0, 2, 0, false}}};

  template <class Num, int R> static void forward(const Tile<SimpleGru, Num, R>& at) {
    vec z[R][2];
    at.inputs(z, 0);
    at.template add_product<0, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec candidate = tanh_(z[r][0]), update = sigmoid(z[r][1]), c = at.previous(0, r);
      at.save_gate(r, 0, candidate);
      at.save_gate(r, 1, update);
      at.save_state(0, r, c + update * (candidate - c));
    }
  }

  template <class Num, int R> static void backward(const Tile<SimpleGru, Num, R>& at) {
    for (int r = 0; r < R; ++r) {
      vec candidate = at.gate(r, 0), update = at.gate(r, 1), keep = 1.0f - update;
      vec delta = at.delta(0, r) + at.grad_hidden(r);
      at.save_dz(r, 0, delta * update * (1.0f - candidate * candidate));
      at.save_dz(r, 1, delta * (candidate - at.previous(0, r)) * update * keep);
      at.save_delta(0, r, delta * keep);
    }
  }

  template <int I, class Tile> static void after(const Tile& at, int r, vec sum) {
    at.save_delta(0, r, at.delta(0, r) + sum);
  }
};
