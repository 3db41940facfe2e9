#include "build_info.h"

namespace liverelay {

std::string version() { return LIVERELAY_VERSION; }

std::map<std::string, std::string> build_info() {
  return {
      {"version", LIVERELAY_VERSION},
      {"build", LIVERELAY_BUILD},
      {"compiler", __VERSION__},
      {"cxx", std::to_string(__cplusplus)},
#if defined(__x86_64__)
      {"machine", "x86_64"},
#elif defined(__aarch64__)
      {"machine", "aarch64"},
#else
      {"machine", "other"},
#endif
  };
}

}  // namespace liverelay
