// torch.ops.fastscarce_emulated.set_order, of the emulator's threads and blocks; set_clusters;
// what was loaded since the process began, in bytes and in loads.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

namespace {
void set_order(int64_t seed) { emulator::set_order(unsigned(seed)); }
void set_clusters(bool has) { emulator::set_clusters(has); }
int64_t loaded() { return int64_t(emulator::loaded()); }
int64_t loads() { return int64_t(emulator::loads()); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscarce, m) {
  m.def("set_order(int seed) -> ()");
  m.def("set_clusters(bool has) -> ()");
  m.def("loaded() -> int");
  m.def("loads() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastscarce, CompositeExplicitAutograd, m) {
  m.impl("set_order", TORCH_BOX(&set_order));
  m.impl("set_clusters", TORCH_BOX(&set_clusters));
  m.impl("loaded", TORCH_BOX(&loaded));
  m.impl("loads", TORCH_BOX(&loads));
}
