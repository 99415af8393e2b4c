// torch.ops.fastscarce_emulated.set_order, of the emulator's threads and blocks; set_clusters;
// loaded, in bytes, since the process began.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

namespace {
void set_order(int64_t seed) { emulator::set_order(unsigned(seed)); }
void set_clusters(bool has) { emulator::set_clusters(has); }
int64_t loaded() { return int64_t(emulator::loaded()); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscarce, m) {
  m.def("set_order(int seed) -> ()");
  m.def("set_clusters(bool has) -> ()");
  m.def("loaded() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastscarce, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&set_order));
  m.impl("set_clusters", TORCH_BOX(&set_clusters));
  m.impl("loaded", TORCH_BOX(&loaded));
}
