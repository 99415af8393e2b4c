// What the compiled half checks for itself. Users' mistakes are found in Python, with better words;
// these hold memory safe when an operator is called past it.
#pragma once

#include <stdexcept>
#include <string>

namespace fastscarce {

inline void check(bool holds, const char* operation, const char* need) {
  if (!holds) throw std::invalid_argument(std::string(operation) + " needs " + need + ".");
}

}  // namespace fastscarce
