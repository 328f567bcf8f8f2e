// s = Γr ∘ c′, c̃ = tanh(W_cc s + W_cx x + b_c), c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/gru.py.
// Gates: candidate, update, relevance. State: c. The candidate's product needs s of all units, so a
// step has two phases with a barrier between them.

struct Gru {
  static constexpr int gates = 3;
  static constexpr bool has_second_phase = true;
  // The backward computes product 1 first: add_gradient<1> writes dz of the relevance gate.
  static constexpr std::array<Product, 2> products = {
      {{0, 1, 1, 2, 0, true}, {0, 0, 0, 1, -1, false}}};

  template <class Num, int R> static void forward(const Tile<Gru, Num, R>& tile) {
    vec z[R][2];
    tile.inputs(z, 1);
    tile.template add_product<0, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec relevance = sigmoid(z[r][1]);
      tile.save_gate(r, 1, sigmoid(z[r][0]));
      tile.save_gate(r, 2, relevance);
      tile.operand(1, 0, r, relevance * tile.previous(0, r));
    }
  }

  template <class Num, int R> static void forward_second(const Tile<Gru, Num, R>& tile) {
    vec z[R][1];
    tile.inputs(z, 0);
    tile.template add_product<1, 0>(z);
    for (int r = 0; r < R; ++r) {
      vec candidate = tanh_(z[r][0]), c = tile.previous(0, r);
      tile.save_gate(r, 0, candidate);
      tile.save_state(0, r, c + tile.gate(r, 1) * (candidate - c));
    }
  }

  template <class Num, int R> static void backward(const Tile<Gru, Num, R>& tile) {
    for (int r = 0; r < R; ++r) {
      vec candidate = tile.gate(r, 0), update = tile.gate(r, 1), keep = 1.0f - update;
      vec delta = tile.delta(0, r) + tile.grad_hidden(r);
      tile.save_dz(r, 0, delta * update * (1.0f - candidate * candidate));
      tile.save_dz(r, 1, delta * (candidate - tile.previous(0, r)) * update * keep);
      tile.save_delta(0, r, delta * keep);
    }
  }

  template <int I, class Tile> static void add_gradient(const Tile& tile, int r, vec sum) {
    if constexpr (I == 1) {  // sum is ds = dz_c W_cc
      vec relevance = tile.gate(r, 2);
      tile.save_dz(r, 2, sum * tile.previous(0, r) * relevance * (1.0f - relevance));
      sum *= relevance;
    }
    tile.save_delta(0, r, tile.delta(0, r) + sum);
  }
};
