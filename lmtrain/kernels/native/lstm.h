// c = Γu ∘ c̃ + Γf ∘ c′, a = Γo ∘ h(c), h = tanh, or the identity as the other form; see
// cells/lstm.py and cells/peephole_lstm.py.
// Gates: candidate, update, forget, output. State: hidden a, cell_state c.

enum Peephole { NONE, FULL, DIAGONAL };

template <Peephole PEEPHOLE> struct Lstm {
  static constexpr int gates = 4;
  static constexpr bool has_second_phase = false;
  static constexpr auto make() {
    if constexpr (PEEPHOLE == FULL)
      return std::array<Product, 2>{{{0, 0, 0, 4, 0, false}, {1, 0, 1, 3, 1, false}}};
    else
      return std::array<Product, 1>{{{0, 0, 0, 4, 0, false}}};
  }
  static constexpr auto products = make();
  template <class Tile> static vec squash(const Tile& at, vec c) {
    return at.is_other() ? c : tanh_(c);
  }
  template <class Tile> static vec seen(const Tile& at, int gate) {
    return load(at.w.a.peephole + (gate - 1) * at.w.H() + at.unit(), at.n);
  }

  template <class Num, int R> static void forward(const Tile<Lstm, Num, R>& at) {
    vec z[R][4];
    at.inputs(z, 0);
    at.template add_product<0, 0>(z);
    if constexpr (PEEPHOLE == FULL) at.template add_product<1, 1>(z);
    if constexpr (PEEPHOLE == DIAGONAL)
      for (int g = 1; g < 4; ++g)
        for (int r = 0; r < R; ++r) z[r][g] += seen(at, g) * at.previous(1, r);
    for (int r = 0; r < R; ++r) {
      vec candidate = tanh_(z[r][0]), update = sigmoid(z[r][1]), forget = sigmoid(z[r][2]),
          output = sigmoid(z[r][3]);
      vec c = update * candidate + forget * at.previous(1, r);
      at.save_gate(r, 0, candidate);
      at.save_gate(r, 1, update);
      at.save_gate(r, 2, forget);
      at.save_gate(r, 3, output);
      at.save_state(1, r, c);
      at.save_state(0, r, output * squash(at, c));
    }
  }

  template <class Num, int R> static void backward(const Tile<Lstm, Num, R>& at) {
    for (int r = 0; r < R; ++r) {
      vec candidate = at.gate(r, 0), update = at.gate(r, 1), forget = at.gate(r, 2),
          output = at.gate(r, 3);
      vec h = squash(at, at.current(1, r));
      vec delta_a = at.delta(0, r) + at.grad_hidden(r);
      vec slope = at.is_other() ? splat(1) : 1.0f - h * h;
      vec delta_c = at.delta(1, r) + delta_a * output * slope;
      vec dz_u = delta_c * candidate * update * (1.0f - update);
      vec dz_f = delta_c * at.previous(1, r) * forget * (1.0f - forget);
      vec dz_o = delta_a * h * output * (1.0f - output);
      at.save_dz(r, 0, delta_c * update * (1.0f - candidate * candidate));
      at.save_dz(r, 1, dz_u);
      at.save_dz(r, 2, dz_f);
      at.save_dz(r, 3, dz_o);
      delta_c *= forget;
      if constexpr (PEEPHOLE == DIAGONAL)
        delta_c += dz_u * seen(at, 1) + dz_f * seen(at, 2) + dz_o * seen(at, 3);
      at.save_delta(1, r, delta_c);
    }
  }

  template <int I, class Tile> static void after(const Tile& at, int r, vec sum) {
    at.save_delta(I, r, I == 0 ? sum : at.delta(1, r) + sum);
  }
};
