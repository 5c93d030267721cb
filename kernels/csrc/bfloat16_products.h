// Products with bfloat16 weights (bfloat16.h): few rows multiply several panels side by side, many
// rows share one or two. Where weights are widened, many rows share a panel of floats in scratch.

// out[r][first + i] <- acc + bias of the first `outputs` outputs of a panel.
template <int R>
INLINE void store_outputs(const vf (&acc)[PV][R], int64_t outputs, const float* bias,
                          Rows<float> out, int64_t first) {
  float b[PANEL] = {};
  if (bias) memcpy(b, bias + first, sizeof(float) * outputs);
  // A constant index keeps the sums in registers.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float result[PANEL];
    float* const to = out[r] + first;
    for (int v = 0; v < PV; ++v)
      store((outputs == PANEL ? to : result) + v * W, acc[v][r] + load(b + v * W));
    if (outputs < PANEL) memcpy(to, result, sizeof(float) * outputs);
  }
}

// Hidden columns of a panel: `to` is where its first one and the first row lie in packed rows.
template <int R>
INLINE void store_packed(const vf (&gate)[PV][R], const vf (&up)[PV][R], float* to, int64_t step,
                         int64_t outputs) {
#if defined(LOCKSTEP_BFLOAT16_PRODUCTS)
  const __mmask16 there = static_cast<__mmask16>((1u << outputs) - 1);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512 hidden = (__m512)(silu(gate[0][r]) * up[0][r]);
    const auto halves = _mm512_cvtneps_pbh(_mm512_maskz_mov_ps(there, hidden));
    float pairs[PANEL / 2];
    memcpy(pairs, &halves, sizeof(pairs));
    for (int64_t i = 0; i < (outputs + 1) / 2; ++i)
      memcpy(to + i * step + r, pairs + i, sizeof(float));
  }
#else
  store_hidden<R>(gate, up, to, step, outputs);
#endif
}

// Outputs first .. end with P panels side by side, `jump` outputs apart, so that each place is read
// as a stream. Returns the first output that is left.
template <int P>
INLINE int64_t linear_side(const float* packed, int64_t rows, const Bfloat16& w, const float* bias,
                           int64_t first, int64_t end, Rows<float> out, uint16_t* own) {
  // One panel at a time takes what is left, the last one in part.
  const int64_t jump = (end - first + (P == 1 ? PANEL - 1 : 0)) / PANEL / P * PANEL;
  for (int64_t n0 = first; n0 < first + jump; n0 += PANEL) {
    const uint16_t* panel[P];
    for (int p = 0; p < P; ++p) panel[p] = pair_panel(w, n0 + p * jump, own + p * PANEL * w.inputs);
    const int64_t outputs = end - n0 < PANEL ? end - n0 : PANEL;
    for_each_packed(rows, [&](int64_t block, int64_t block_rows, int64_t step) {
      for_each_run<most_rows(P)>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        vf acc[P][PV][R];
        pair_tile<P, R>(panel, packed + block * packed_words(w.inputs) + row, step, w.inputs, acc);
        for (int p = 0; p < P; ++p)
          store_outputs<R>(acc[p], outputs, bias, out.from(block + row), n0 + p * jump);
      });
    });
  }
  return first + P * jump;
}

// The same for hidden columns, P panels of both matrices.
template <int P>
INLINE int64_t gate_up_side(const float* packed, int64_t rows, const Bfloat16& w1,
                            const Bfloat16& w3, int64_t first, int64_t end, float* hidden,
                            uint16_t* own) {
  const int64_t depth = w1.inputs, words = packed_words(w1.outputs);
  const int64_t jump = (end - first + (P == 1 ? PANEL - 1 : 0)) / PANEL / P * PANEL;
  for (int64_t f0 = first; f0 < first + jump; f0 += PANEL) {
    const uint16_t* panel[2 * P];
    for (int p = 0; p < P; ++p) {
      panel[p] = pair_panel(w1, f0 + p * jump, own + p * PANEL * depth);
      panel[P + p] = pair_panel(w3, f0 + p * jump, own + (P + p) * PANEL * depth);
    }
    const int64_t outputs = end - f0 < PANEL ? end - f0 : PANEL;
    for_each_packed(rows, [&](int64_t block, int64_t block_rows, int64_t step) {
      for_each_run<most_rows(2 * P)>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        const float* const x = packed + block * packed_words(depth) + row;
        vf acc[2 * P][PV][R];
        if constexpr (W == 16) {
          pair_tile<2 * P, R>(panel, x, step, depth, acc);
        } else {
          for (int p = 0; p < 2 * P; ++p)
            pair_tile<1, R>({panel[p]}, x, step, depth,
                            reinterpret_cast<vf(&)[1][PV][R]>(acc[p]));
        }
        for (int p = 0; p < P; ++p) {
          float* const to = hidden + block * words + packed_words(f0 + p * jump) * step + row;
          store_packed<R>(acc[p], acc[P + p], to, step, outputs);
        }
      });
    });
  }
  return first + P * jump;
}

// More than FEW_WIDENED rows, where weights are widened: in `own`, once a panel.
INLINE void linear_widened(const float* packed, int64_t rows, const Bfloat16& w, const float* bias,
                           int64_t first, int64_t end, Rows<float> out, float* own) {
  const int64_t depth = w.inputs;
  for (int64_t n0 = first; n0 < end; n0 += PANEL) {
    const int64_t outputs = end - n0 < PANEL ? end - n0 : PANEL;
    widen(pair_panel(w, n0, reinterpret_cast<uint16_t*>(own + PANEL * depth)), depth, own);
    for_each_packed(rows, [&](int64_t block, int64_t block_rows, int64_t step) {
      const float* const x = packed + block * depth;
      if (outputs == PANEL && fills<MAX_MV>(block_rows))
        return linear_full<MAX_MV>(own, x, block_rows, depth, bias ? bias + n0 : nullptr,
                               out.from(block), n0);
      for_each_run<ONE>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        vf acc[1][PV][R];
        panel_tile<1, R>({own}, x + row, step, depth, acc);
        store_outputs<R>(acc[0], outputs, bias, out.from(block + row), n0);
      });
    });
  }
}

INLINE void gate_up_widened(const float* packed, int64_t rows, const Bfloat16& w1,
                            const Bfloat16& w3, int64_t first, int64_t end, float* hidden,
                            float* own) {
  const int64_t depth = w1.inputs, width = w1.outputs;
  float *const gate = own, *const up = gate + PANEL * depth;
  uint16_t* const other = reinterpret_cast<uint16_t*>(up + PANEL * depth);
  for (int64_t f0 = first; f0 < end; f0 += PANEL) {
    const int64_t outputs = end - f0 < PANEL ? end - f0 : PANEL;
    widen(pair_panel(w1, f0, other), depth, gate);
    widen(pair_panel(w3, f0, other), depth, up);
    for_each_packed(rows, [&](int64_t block, int64_t block_rows, int64_t step) {
      const float* const x = packed + block * depth;
      float* const to = hidden + block * width + f0 * step;
      if (outputs == PANEL && fills<MAX_MV>(block_rows))
        return gate_up_full<MAX_MV>(gate, up, x, depth, to);
      for_each_run<ONE>(block_rows, [&](auto run, int64_t row) {
        constexpr int R = decltype(run)::value;
        vf acc[2][PV][R];
        panel_tile<1, R>({gate}, x + row, step, depth, reinterpret_cast<vf(&)[1][PV][R]>(acc[0]));
        panel_tile<1, R>({up}, x + row, step, depth, reinterpret_cast<vf(&)[1][PV][R]>(acc[1]));
        store_hidden<R>(acc[0], acc[1], to + row, step, outputs);
      });
    });
  }
}

void linear_bfloat16(const float* packed, int64_t rows, const Bfloat16& w, const float* bias,
                     int64_t first, int64_t count, Rows<float> out, float* own) {
  const int64_t end = first + count;
  if constexpr (!PAIRS) {
    if (rows > FEW_WIDENED) return linear_widened(packed, rows, w, bias, first, end, out, own);
  }
  uint16_t* const panels = reinterpret_cast<uint16_t*>(own);
  if constexpr (W == 16) {
    if (rows <= FEW) first = linear_side<4>(packed, rows, w, bias, first, end, out, panels);
  }
  if constexpr (SIDE > 1) first = linear_side<SIDE>(packed, rows, w, bias, first, end, out, panels);
  linear_side<1>(packed, rows, w, bias, first, end, out, panels);
}

void gate_up_bfloat16(const float* packed, int64_t rows, const Bfloat16& w1, const Bfloat16& w3,
                      int64_t first, int64_t count, float* hidden, float* own) {
  const int64_t end = first + count;
  if constexpr (!PAIRS) {
    if (rows > FEW_WIDENED) return gate_up_widened(packed, rows, w1, w3, first, end, hidden, own);
  }
  uint16_t* const panels = reinterpret_cast<uint16_t*>(own);
  if constexpr (W == 16) {
    if (rows <= FEW) first = gate_up_side<2>(packed, rows, w1, w3, first, end, hidden, panels);
  }
  gate_up_side<1>(packed, rows, w1, w3, first, end, hidden, panels);
}
