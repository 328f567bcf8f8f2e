// c = Γu ∘ c̃ + Γf ∘ c′, a = Γo ∘ h(c), h = tanh or the identity; see cells/lstm.py and
// cells/peephole_lstm.py. Gates: candidate, update, forget, output. State: a, c.

enum Peephole { NONE, FULL, DIAGONAL };

template <Peephole PEEPHOLE> struct Lstm {
  static constexpr int gates = 4;
  static constexpr bool has_second_phase = false;
  static constexpr auto make_products() {
    if constexpr (PEEPHOLE == FULL)
      return std::array<Product, 2>{{{0, 0, 0, 4, 0, false}, {1, 0, 1, 3, 1, false}}};
    else
      return std::array<Product, 1>{{{0, 0, 0, 4, 0, false}}};
  }
  static constexpr auto products = make_products();
  template <class Tile> static vec output_activation(const Tile& tile, vec c) {
    return tile.is_tanh() ? tanh_(c) : c;
  }
  template <class Tile> static vec peephole_weights(const Tile& tile, int gate) {
    return load(tile.w.a.peephole + (gate - 1) * tile.w.H() + tile.unit(), tile.n);
  }

  template <class Num, int R> static void forward(const Tile<Lstm, Num, R>& tile) {
    vec z[R][4];
    tile.inputs(z, 0);
    tile.template add_product<0, 0>(z);
    if constexpr (PEEPHOLE == FULL) tile.template add_product<1, 1>(z);
    if constexpr (PEEPHOLE == DIAGONAL)
      for (int g = 1; g < 4; ++g)
        for (int r = 0; r < R; ++r) z[r][g] += peephole_weights(tile, g) * tile.previous(1, r);
    for (int r = 0; r < R; ++r) {
      vec candidate = tanh_(z[r][0]), update = sigmoid(z[r][1]), forget = sigmoid(z[r][2]),
          output = sigmoid(z[r][3]);
      vec c = update * candidate + forget * tile.previous(1, r);
      tile.save_gate(r, 0, candidate);
      tile.save_gate(r, 1, update);
      tile.save_gate(r, 2, forget);
      tile.save_gate(r, 3, output);
      tile.save_state(1, r, c);
      tile.save_state(0, r, output * output_activation(tile, c));
    }
  }

  template <class Num, int R> static void backward(const Tile<Lstm, Num, R>& tile) {
    for (int r = 0; r < R; ++r) {
      vec candidate = tile.gate(r, 0), update = tile.gate(r, 1), forget = tile.gate(r, 2),
          output = tile.gate(r, 3);
      vec h = output_activation(tile, tile.current(1, r));
      vec delta_a = tile.delta(0, r) + tile.grad_hidden(r);
      vec slope = tile.is_tanh() ? 1.0f - h * h : splat(1);
      vec delta_c = tile.delta(1, r) + delta_a * output * slope;
      vec dz_u = delta_c * candidate * update * (1.0f - update);
      vec dz_f = delta_c * tile.previous(1, r) * forget * (1.0f - forget);
      vec dz_o = delta_a * h * output * (1.0f - output);
      tile.save_dz(r, 0, delta_c * update * (1.0f - candidate * candidate));
      tile.save_dz(r, 1, dz_u);
      tile.save_dz(r, 2, dz_f);
      tile.save_dz(r, 3, dz_o);
      delta_c *= forget;
      if constexpr (PEEPHOLE == DIAGONAL)
        delta_c += dz_u * peephole_weights(tile, 1) + dz_f * peephole_weights(tile, 2) +
                   dz_o * peephole_weights(tile, 3);
      tile.save_delta(1, r, delta_c);
    }
  }

  template <int I, class Tile> static void add_gradient(const Tile& tile, int r, vec sum) {
    tile.save_delta(I, r, I == 0 ? sum : tile.delta(1, r) + sum);
  }
};
