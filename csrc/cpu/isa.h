// The instruction set in use: the best of this machine, or what FASTSCARCE_ISA or set_isa names.
#pragma once

#include <string>

namespace fastscarce::cpu {

enum class Isa { scalar, avx2, avx512, emulated };

Isa isa();
std::string isa_name();
// Sets it for the process; throws where this machine cannot run it. "" goes back to the default.
void set_isa(const std::string& name);

}  // namespace fastscarce::cpu
