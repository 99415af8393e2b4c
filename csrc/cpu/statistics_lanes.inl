// Statistics of rows of few classes: one row a lane, as the losses have them (kd_lanes.inl).
// Nothing is reduced across lanes, and a logarithm is that of as many rows.
//
// Included after kd_lanes.inl and selection.h of csrc/math, in the namespace of an instruction set
// with vectors.

template <class V, class Exponential>
struct StatisticsLanes {
  static constexpr int64_t L = V::lanes;

  struct Block {
    alignas(64) float lanes[kLaneClasses * L], rows[L][kLaneClasses], top[L];

    // L rows; lanes past the last row repeat it, and nothing of theirs is stored.
    Block(const Matrix& matrix, int64_t row, int64_t count, int64_t classes) {
      if (matrix.dtype == Dtype::float32 && count == L) {
        const float* const from = static_cast<const float*>(matrix.data) + row * matrix.row_stride;
        rows_to_lanes<V>(from, matrix.row_stride, classes, lanes, top);
        return;
      }
      for (int64_t i = 0; i < L; ++i) {
        const int64_t at = (row + std::min(i, count - 1)) * matrix.row_stride;
        read_as(static_cast<const char*>(matrix.data) + at * size_of(matrix.dtype), matrix.dtype,
                rows[i], classes);
      }
      rows_to_lanes<V>(rows[0], kLaneClasses, classes, lanes, top);
    }
    V at(int64_t c) const { return V::load(lanes + c * L); }

    // The first class of each lane's largest logit, of a lane without NaN.
    V place(int64_t classes) const {
      const V wanted = V::load(top), one(1.0f), none{float(classes)};
      V out = none;
      for (int64_t c = 0; c < classes; ++c)
        out = minimum(out, select(where_equal(at(c), wanted, one), V(float(c)), none));
      return out;
    }
  };

  static void argmax(const Matrix& logits, int64_t classes, int64_t no_answer, int64_t* label,
                     int64_t begin, int64_t end) {
    alignas(64) float places[L];
    for (int64_t row = begin; row < end; row += L) {
      const int64_t count = std::min(L, end - row);
      const Block block(logits, row, count, classes);
      uint32_t sound = ~uint32_t(0);
      for (int64_t c = 0; c < classes; ++c) sound &= equal(block.at(c), block.at(c));
      block.place(classes).store(places);
      for (int64_t i = 0; i < count; ++i) {
        const bool answer =
            sound >> i & 1 && block.top[i] > -INFINITY && block.top[i] < float(INFINITY);
        label[row + i] = answer ? int64_t(places[i]) : no_answer;
      }
    }
  }

  static void confidence(const ConfidenceCall& call, int64_t begin, int64_t end) {
    const double rate = 1.0 / call.temperature;
    const Exponential exp_of(rate);
    const V zero(0.0f), lowest(-FLT_MAX), by{float(rate)};
    alignas(64) float places[L], sums[L], sure[L], entropies[L];
    for (int64_t row = begin; row < end; row += L) {
      const int64_t count = std::min(L, end - row);
      const Block block(call.logits, row, count, call.classes);
      // A finite shift, for a row without a finite logit too.
      const V shift = maximum(lowest, V::load(block.top));
      V sum = zero, dot = zero;
      for (int64_t c = 0; c < call.classes; ++c) {
        const V x = block.at(c) - shift, e = exp_of(x);
        sum = sum + e;
        dot = multiply_add(e, zero_unless(e, x), dot);
      }
      const ConfidenceRow<V> out = finish_confidence(sum, zero, dot * by);
      block.place(call.classes).store(places);
      sum.store(sums);
      out.confidence.store(sure);
      out.entropy.store(entropies);
      for (int64_t i = 0; i < count; ++i) {
        const bool answer = sums[i] > 0;  // not NaN, and some class is finite
        call.label[row + i] = answer ? int64_t(places[i]) : call.no_answer;
        static_cast<float*>(call.confidence)[row + i] = answer ? sure[i] : NAN;
        static_cast<float*>(call.entropy)[row + i] = answer ? entropies[i] : NAN;
      }
    }
  }
};
