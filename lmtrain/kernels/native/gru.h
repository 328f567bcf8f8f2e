// s = Γr ∘ c′, c̃ = tanh(W_cc s + ...), c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/gru.py.
// Gates: candidate, update, relevance. The candidate's product waits for s of all units.

struct Gru {
  static constexpr int gates = 3;
  static constexpr bool has_second_phase = true;
  // Backward runs the candidate's product first; its end writes the relevance gate's dz.
  static constexpr std::array<Product, 2> products = {
      {{0, 1, 1, 2, 0, true}, {0, 0, 0, 1, -1, false}}};

  template <class Num, int R> static void forward(const Tile<Gru, Num, R>& at) {
    vec z[R][2];
    at.inputs(z, 1);
    at.template add_product<0, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec relevance = sigmoid(z[r][1]);
      at.save_gate(r, 1, sigmoid(z[r][0]));
      at.save_gate(r, 2, relevance);
      at.operand(1, 0, r, relevance * at.previous(0, r));
    }
  }

  template <class Num, int R> static void forward_second(const Tile<Gru, Num, R>& at) {
    vec z[R][1];
    at.inputs(z, 0);
    at.template add_product<1, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec candidate = tanh_(z[r][0]), c = at.previous(0, r);
      at.save_gate(r, 0, candidate);
      at.save_state(0, r, c + at.gate(r, 1) * (candidate - c));
    }
  }

  template <class Num, int R> static void backward(const Tile<Gru, Num, R>& at) {
    for (int r = 0; r < R; ++r) {
      vec candidate = at.gate(r, 0), update = at.gate(r, 1), keep = 1.0f - update;
      vec delta = at.delta(0, r) + at.grad_hidden(r);
      at.save_dz(r, 0, delta * update * (1.0f - candidate * candidate));
      at.save_dz(r, 1, delta * (candidate - at.previous(0, r)) * update * keep);
      at.save_delta(0, r, delta * keep);
    }
  }

  template <int I, class Tile> static void after(const Tile& at, int r, vec sum) {
    if constexpr (I == 1) {  // sum = ds
      vec relevance = at.gate(r, 2);
      at.save_dz(r, 2, sum * at.previous(0, r) * relevance * (1.0f - relevance));
      sum *= relevance;
    }
    at.save_delta(0, r, at.delta(0, r) + sum);
  }
};
