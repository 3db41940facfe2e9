// Table of contents of liverelay.engine._C; the work is in the other files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_frame_ring.h"
#include "bind_stage_loop.h"
#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "liverelay's compiled module; every function has a Python twin";
  m.attr("version") = liverelay::version();
  m.def("build_info", &liverelay::build_info, "How the module was built: version, build, compiler, cxx, machine.");
  liverelay::bind_frame_ring(m);
  liverelay::bind_stage_loop(m);
}
