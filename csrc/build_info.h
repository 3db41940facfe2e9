// Facts about how the module was built.
#pragma once

#include <map>
#include <string>

namespace liverelay {

std::string version();
std::map<std::string, std::string> build_info();

}  // namespace liverelay
