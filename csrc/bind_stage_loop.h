// Python's view of the stage loop.
#pragma once

#include <pybind11/pybind11.h>

namespace liverelay {

void bind_stage_loop(pybind11::module_& m);

}  // namespace liverelay
