// Python's view of the frame ring.
#pragma once

#include <pybind11/pybind11.h>

namespace liverelay {

void bind_frame_ring(pybind11::module_& m);

}  // namespace liverelay
