// A few wide rows, fewer than threads: each is cut into parts, parts of a row on different threads.
//
// The same bits as one thread's row: a chunk's exponentials are relative to the maxima of all the
// chunks before it, so these are found first, in a phase of their own. The caches that threads
// share keep the row in between.
//
// Included after kd_loss.inl, in the namespace of an instruction set.

template <class V, class Exponential>
struct KdParts {
  using Body = Kd<V, Exponential>;
  using A = typename Body::A;
  using Setup = typename Body::Setup;
  using Reference = typename Body::Reference;
  using Kept = typename Body::Kept;
  using Statistics = typename Body::Statistics;

  // A row's place in the workspace: statistics, exponentials, maxima. Whole lines.
  static int64_t place_size(const Setup& setup) {
    const int64_t maxima = setup.chunks * int64_t(sizeof(Reference) / sizeof(A));
    return Body::statistics_size(setup) + Body::exponentials_size(setup) + (maxima + 15) / 16 * 16;
  }
  static int64_t workspace_bytes(const KdCall& call) {
    return call.rows * place_size(Setup(call)) * int64_t(sizeof(A));
  }

  struct Place {
    Kept kept;
    Reference* maxima;  // of each chunk
    Place(const Setup& setup, void* workspace, int64_t row) {
      A* const statistics = static_cast<A*>(workspace) + row * place_size(setup);
      A* const exponentials = statistics + Body::statistics_size(setup);
      kept = Body::place(setup, statistics, exponentials);
      maxima = reinterpret_cast<Reference*>(exponentials + Body::exponentials_size(setup));
    }
  };

  // of(row, part, place, first, last) for the chunks of every part.
  template <class Of>
  static void each(const Setup& setup, int64_t parts, void* workspace, int64_t begin, int64_t end,
                   Of of) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / parts, part = item % parts;
      of(row, part, Place(setup, workspace, row), setup.chunks * part / parts,
         setup.chunks * (part + 1) / parts);
    }
  }

  static void maxima(const KdCall& call, int64_t parts, void* workspace, int64_t begin,
                     int64_t end) {
    const Setup setup(call);
    typename Body::Buffers buffers;
    const auto of_chunk =
        setup.teacher ? &Body::template chunk_maxima<true> : &Body::template chunk_maxima<false>;
    each(setup, parts, workspace, begin, end,
         [&](int64_t row, int64_t, const Place& place, int64_t first, int64_t last) {
           for (int64_t k = first; k < last; ++k) {
             const int64_t from = k * setup.chunk, n = std::min(setup.chunk, call.classes - from);
             const A* s = read_row<A>(call.student, row, from, n, buffers.student);
             const A* t =
                 setup.teacher ? read_row<A>(call.teacher, row, from, n, buffers.teacher) : nullptr;
             place.maxima[k] = of_chunk(s, t, n);
           }
         });
  }

  static void statistics(const KdCall& call, int64_t parts, void* workspace, int64_t begin,
                         int64_t end) {
    const Setup setup(call);
    const auto statistics_of = Body::statistics_function(setup);
    typename Body::Buffers buffers;
    each(setup, parts, workspace, begin, end,
         [&](int64_t row, int64_t, const Place& place, int64_t first, int64_t last) {
           Reference reference;
           for (int64_t k = 0; k < first; ++k) reference.take(place.maxima[k]);
           Body::statistics(setup, statistics_of, row, first, last, reference, place.kept, buffers);
         });
  }

  static void gradients(const KdCall& call, int64_t parts, void* workspace, int64_t begin,
                        int64_t end) {
    const Setup setup(call);
    const auto gradient_of = Body::gradient_function(setup);
    typename Body::Buffers buffers;
    each(setup, parts, workspace, begin, end,
         [&](int64_t row, int64_t part, const Place& place, int64_t first, int64_t last) {
           const Label label = label_of(call, row);
           KdWeights<A> w = Body::weights_of(call, label, row);
           if (label.outside || !Body::counts(setup, w)) {
             if (part == 0) Body::leave_out(call, row, label.outside);
             return;
           }
           Statistics room;
           const Statistics& whole = Body::merged(setup, place.kept, room);
           typename Body::Coefficients c;
           Body::coefficients(setup, row, label, w, whole, c);
           if (part == 0) static_cast<A*>(call.losses)[row] = c.loss;
           if (setup.keep)
             Body::gradients(setup, gradient_of, row, first, last, label, c, whole, place.kept,
                             buffers);
         });
  }
};
