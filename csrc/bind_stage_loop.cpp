// Bindings of the stage loop; engine/relay/native_loop.py is the face that the pipeline meets.
//
// The lock of the interpreter (GIL) is given away by whatever waits, and never asked for under a mutex. It is given and
// taken by hand: a thread that an ending interpreter kills where it asks for it must not be inside a destructor.
#include "bind_stage_loop.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "stage_loop.h"

namespace py = pybind11;

namespace liverelay {
namespace {

constexpr std::int64_t kSliceNs = 100000000;  // of a wait that may be the main thread's, so that Ctrl-C is seen

thread_local PyThreadState* looping = nullptr;  // of the thread in `run`, while it is without the GIL

template <typename Work>
auto without_gil(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    auto result = work();
    PyEval_RestoreThread(state);
    return result;
  } catch (const std::exception&) {  // not the end of the thread, which passes through
    PyEval_RestoreThread(state);
    throw;
  }
}

void* address(std::uintptr_t number) { return reinterpret_cast<void*>(number); }

// Calls it with the GIL; an exception stays in the thread's state until `run` returns.
bool call(PyObject* function) {
  PyEval_RestoreThread(looping);
  PyObject* const result = PyObject_CallNoArgs(function);
  const bool good = result != nullptr;
  Py_XDECREF(result);
  looping = PyEval_SaveThread();
  return good;
}

// What a stage has to do for a job, in order. It can be put many times; put, it is not added to any more.
struct Work {
  std::shared_ptr<Program> ops = std::make_shared<Program>();
  bool was_put = false;

  Op& add(OpKind kind) {
    if (was_put) throw std::invalid_argument("this program was put already");
    ops->emplace_back();
    ops->back().kind = kind;
    return ops->back();
  }
  void move(OpKind kind, const std::shared_ptr<StageLink>& link,
            const std::vector<std::tuple<std::size_t, std::uintptr_t, std::size_t>>& parts) {
    std::vector<Part> checked;
    for (const auto& [offset, memory, bytes] : parts) {
      if (offset > link->bytes() || bytes > link->bytes() - offset) {
        throw std::invalid_argument("a part of the block is outside of the link's buffers");
      }
      checked.push_back({offset, static_cast<std::uint8_t*>(address(memory)), bytes});
    }
    Op& op = add(kind);
    op.link = link;
    op.parts = std::move(checked);
  }
  void copy(std::uintptr_t target, std::uintptr_t source, std::size_t bytes) {
    Op& op = add(OpKind::copy);
    op.target = address(target);
    op.source = address(source);
    op.bytes = bytes;
  }
  void launch(std::uintptr_t graph) { add(OpKind::launch).target = address(graph); }
  void sleep(double seconds) { add(OpKind::sleep).ns = static_cast<std::int64_t>(seconds * 1e9); }
  void call(const py::function& function) {
    // Programs end where the GIL is held: in `put`, `take` and `run` of the bindings.
    const std::shared_ptr<PyObject> kept(function.inc_ref().ptr(), [](PyObject* object) { Py_DECREF(object); });
    add(OpKind::call).call = [kept] { return liverelay::call(kept.get()); };
  }
};

bool put(StageLoop& loop, std::uint64_t id, Work& work) {
  work.was_put = true;
  return loop.put(id, work.ops);
}

// "stopped", or "closed" by a link's end. Raises what a call raised; RuntimeError when the device fails.
const char* run(const std::shared_ptr<StageLoop>& loop, int device, std::uintptr_t stream) {
  RunEnd end = RunEnd::stopped;
  std::string fault;
  looping = PyEval_SaveThread();
  try {
    end = loop->run(device, address(stream));
  } catch (const std::exception& error) {
    fault = error.what();
  }
  PyEval_RestoreThread(std::exchange(looping, nullptr));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (!fault.empty()) throw std::runtime_error(fault);
  return end == RunEnd::closed ? "closed" : "stopped";
}

// (id, asked, begun, computed, ended, fault), seconds; id -1: a job is worked on since `asked`, too long. None: the end.
py::object take(const std::shared_ptr<StageLoop>& loop) {
  Told told;
  const Took took = without_gil([&] { return loop->take(told); });
  if (took == Took::ended) return py::none();
  const auto id = took == Took::told ? static_cast<std::int64_t>(told.id) : -1;
  const auto seconds = [](std::int64_t ns) { return 1e-9 * static_cast<double>(ns); };
  return py::make_tuple(id, seconds(told.asked_ns), seconds(told.begun_ns), seconds(told.computed_ns),
                        seconds(told.ended_ns), told.fault);
}

template <int (StageLink::*Take)(CudaStream, std::int64_t)>
int take_buffer(const std::shared_ptr<StageLink>& link, std::uintptr_t stream) {
  for (;;) {
    const int buffer = without_gil([&] { return (link.get()->*Take)(address(stream), kSliceNs); });
    if (buffer != kLinkWaits) return buffer;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

std::shared_ptr<StageLink> make_link(const std::vector<std::uintptr_t>& buffers, std::size_t bytes, int device) {
  std::vector<std::uint8_t*> memory;
  for (const std::uintptr_t buffer : buffers) memory.push_back(static_cast<std::uint8_t*>(address(buffer)));
  return std::make_shared<StageLink>(std::move(memory), bytes, device);
}

// Plain `type` as the metaclass: nothing here has static properties, and the stub can say it.
py::metaclass plain() { return py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)); }

void bind_link(py::module_& m) {
  using Self = const std::shared_ptr<StageLink>&;
  const auto stream = py::arg("stream") = 0;
  py::class_<StageLink, std::shared_ptr<StageLink>>(m, "StageLink", plain())
      .def(py::init(&make_link), py::arg("buffers"), py::arg("bytes"), py::arg("device") = kHost)
      .def("take_free", &take_buffer<&StageLink::take_free>, stream)
      .def("take_full", &take_buffer<&StageLink::take_full>, stream)
      .def("give_free", [](Self link, int buffer, std::uintptr_t at) { link->give_free(buffer, address(at)); },
           py::arg("buffer"), stream)
      .def("give_full", [](Self link, int buffer, std::uintptr_t at) { link->give_full(buffer, address(at)); },
           py::arg("buffer"), stream)
      .def("close", &StageLink::close);
}

}  // namespace

void bind_stage_loop(py::module_& m) {
  m.def("cuda_open", &cuda_open, py::arg("path") = "", "Open the CUDA runtime; what is wrong, or an empty text.");
  bind_link(m);
  py::class_<Work>(m, "StageProgram", plain())
      .def(py::init<>())
      .def("receive", [](Work& work, const std::shared_ptr<StageLink>& link,
                         const std::vector<std::tuple<std::size_t, std::uintptr_t, std::size_t>>& parts) {
        work.move(OpKind::receive, link, parts);
      }, py::arg("link"), py::arg("parts"))
      .def("send", [](Work& work, const std::shared_ptr<StageLink>& link,
                      const std::vector<std::tuple<std::size_t, std::uintptr_t, std::size_t>>& parts) {
        work.move(OpKind::send, link, parts);
      }, py::arg("link"), py::arg("parts"))
      .def("begun", [](Work& work) { work.add(OpKind::begun); })
      .def("computed", [](Work& work) { work.add(OpKind::computed); })
      .def("copy", &Work::copy, py::arg("target"), py::arg("source"), py::arg("bytes"))
      .def("launch", &Work::launch, py::arg("graph"))
      .def("sleep", &Work::sleep, py::arg("seconds"))
      .def("call", &Work::call, py::arg("function"));
  py::class_<StageLoop, std::shared_ptr<StageLoop>>(m, "StageLoop", plain())
      .def(py::init([](int ahead, double bound_s) {
        return std::make_shared<StageLoop>(ahead, static_cast<std::int64_t>(bound_s * 1e9));
      }), py::arg("ahead") = 1, py::arg("bound_s") = 0.0)
      .def("put", &put, py::arg("id"), py::arg("program"))
      .def("stop", &StageLoop::stop)
      .def("cancel", &StageLoop::cancel)
      .def("run", &run, py::arg("device") = kHost, py::arg("stream") = 0)
      .def("end", [](StageLoop& loop) { loop.end(); })
      .def("take", &take)
      .def_property_readonly("working_since_s", [](const StageLoop& loop) {
        return 1e-9 * static_cast<double>(loop.working_since_ns());
      });
}

}  // namespace liverelay
