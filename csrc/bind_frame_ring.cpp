// Bindings of the frame ring; engine/frame_ring.py is the face that users meet. Arrays keep their slot: a slot goes back
// when the object of its frame and every array made of it are gone.
#include "bind_frame_ring.h"

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <utility>

#include "frame_ring.h"

namespace py = pybind11;

namespace liverelay {
namespace {

[[noreturn]] void fail(const RingStatus& status) {
  const char* name = status.code == RingCode::closed      ? "RingClosedError"
                     : status.code == RingCode::peer_died ? "RingPeerError"
                                                          : "RingError";
  const py::object type = py::module_::import("liverelay.engine.errors").attr(name);
  PyErr_SetString(type.ptr(), status.text.c_str());
  throw py::error_already_set();
}

void check(const RingStatus& status) {
  if (!status.ok()) fail(status);
}

std::int64_t nanoseconds(double seconds) {
  return seconds > 0 ? seconds < 1e9 ? static_cast<std::int64_t>(seconds * 1e9) : kRingForever : 0;
}

// A slot that the writer fills.
struct Slot {
  std::shared_ptr<RingWriter> writer;
  std::uint32_t index = 0;
  bool open = true;

  Slot(std::shared_ptr<RingWriter> owner, std::uint32_t slot) : writer(std::move(owner)), index(slot) {}
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() { abandon(); }

  void abandon() {
    if (std::exchange(open, false)) writer->abandon();
  }
  void publish(std::uint64_t number, std::int64_t pts_ns, std::uint32_t width, std::uint32_t height,
               std::uint32_t format, std::uint32_t samples, std::uint32_t sample_rate) {
    if (!open) fail({RingCode::refused, "this slot is published or abandoned already"});
    if (samples > kRingMaxAudioBytes / 4) fail({RingCode::refused, "too many samples of sound for a slot"});
    RingMeta meta{};
    meta.index = number;
    meta.pts_ns = pts_ns;
    meta.width = width;
    meta.height = height;
    meta.format = format;
    meta.audio_bytes = samples * 4;
    meta.sample_rate = sample_rate;
    check(writer->publish(meta));
    open = false;
  }
};

// A frame that the reader holds.
struct Held {
  std::shared_ptr<RingReader> reader;
  RingReader::Frame frame;

  Held(std::shared_ptr<RingReader> owner, const RingReader::Frame& held) : reader(std::move(owner)), frame(held) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { reader->release(frame); }
};

template <typename T>
py::array view(const py::object& owner, std::uint8_t* bytes, std::uint64_t size) {
  return py::array_t<T>({static_cast<py::ssize_t>(size / sizeof(T))}, {static_cast<py::ssize_t>(sizeof(T))},
                        reinterpret_cast<T*>(bytes), owner);
}

std::shared_ptr<RingEnd> join(std::shared_ptr<RingSegment> segment, bool writer) {
  if (writer) return std::make_shared<RingWriter>(std::move(segment));
  return std::make_shared<RingReader>(std::move(segment));
}

std::shared_ptr<RingEnd> create(std::uint32_t slots, std::uint64_t frame_bytes, std::uint64_t audio_bytes,
                                bool drop_oldest, bool writer) {
  std::shared_ptr<RingSegment> segment;
  const RingRequest request{slots, frame_bytes, audio_bytes, drop_oldest};
  check(RingSegment::create(request, writer ? RingRole::writer : RingRole::reader, segment));
  return join(std::move(segment), writer);
}

std::shared_ptr<RingEnd> attach(const std::string& name, bool writer) {
  std::shared_ptr<RingSegment> segment;
  check(RingSegment::open(name, writer ? RingRole::writer : RingRole::reader, segment));
  return join(std::move(segment), writer);
}

std::unique_ptr<Slot> reserve(const std::shared_ptr<RingWriter>& writer, double timeout_s) {
  std::uint32_t slot = 0;
  RingStatus status;
  {
    const py::gil_scoped_release release;
    status = writer->reserve(nanoseconds(timeout_s), slot);
  }
  if (status.code == RingCode::timeout) return nullptr;
  check(status);
  return std::make_unique<Slot>(writer, slot);
}

std::unique_ptr<Held> pop(const std::shared_ptr<RingReader>& reader, double timeout_s) {
  RingReader::Frame frame;
  RingStatus status;
  {
    const py::gil_scoped_release release;
    status = reader->pop(nanoseconds(timeout_s), frame);
  }
  if (status.code == RingCode::timeout) return nullptr;
  check(status);
  return std::make_unique<Held>(reader, frame);
}

// Plain `type` as the metaclass: nothing here has static properties, and the stub can say it.
py::metaclass plain() { return py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)); }

void bind_ends(py::module_& m) {
  const auto layout = [](const RingEnd& end) -> const RingStatic& { return end.segment().layout(); };
  py::class_<RingEnd, std::shared_ptr<RingEnd>>(m, "RingEnd", plain())
      .def_property_readonly("name", [](const RingEnd& end) { return end.segment().name(); })
      .def_property_readonly("slots", [layout](const RingEnd& end) { return layout(end).slots; })
      .def_property_readonly("frame_bytes", [layout](const RingEnd& end) { return layout(end).frame_bytes; })
      .def_property_readonly("audio_bytes", [layout](const RingEnd& end) { return layout(end).audio_bytes; })
      .def_property_readonly("drop_oldest", [layout](const RingEnd& end) { return layout(end).drop_oldest != 0; })
      .def_property_readonly("pushed", [](const RingEnd& end) { return end.segment().dynamic().pushed.load(); })
      .def_property_readonly("dropped", [](const RingEnd& end) { return end.segment().dynamic().dropped.load(); })
      .def_property_readonly("unread", &RingEnd::unread)
      .def_property_readonly("peer", [](const RingEnd& end) { return static_cast<int>(end.peer()); })
      .def_property_readonly("peer_silent_ns", &RingEnd::peer_silent_ns)
      .def("close", &RingEnd::close);
  py::class_<RingWriter, RingEnd, std::shared_ptr<RingWriter>>(m, "RingWriter", plain())
      .def("reserve", &reserve, py::arg("timeout_s"));
  py::class_<RingReader, RingEnd, std::shared_ptr<RingReader>>(m, "RingReader", plain())
      .def("pop", &pop, py::arg("timeout_s"));
}

void bind_slots(py::module_& m) {
  py::class_<Slot>(m, "RingSlot", plain())
      .def_property_readonly("frame", [](const py::object& self) {
        const auto& slot = self.cast<Slot&>();
        const RingSegment& segment = slot.writer->segment();
        return view<std::uint8_t>(self, segment.frame(slot.index), segment.layout().frame_bytes);
      })
      .def_property_readonly("audio", [](const py::object& self) {
        const auto& slot = self.cast<Slot&>();
        const RingSegment& segment = slot.writer->segment();
        return view<float>(self, segment.audio(slot.index), segment.layout().audio_bytes);
      })
      .def("publish", &Slot::publish, py::arg("index"), py::arg("pts_ns"), py::arg("width"), py::arg("height"),
           py::arg("format"), py::arg("samples"), py::arg("sample_rate"))
      .def("abandon", &Slot::abandon);
  py::class_<Held>(m, "RingHeld", plain())
      .def_property_readonly("sequence", [](const Held& held) { return held.frame.meta.sequence; })
      .def_property_readonly("index", [](const Held& held) { return held.frame.meta.index; })
      .def_property_readonly("pts_ns", [](const Held& held) { return held.frame.meta.pts_ns; })
      .def_property_readonly("pushed_ns", [](const Held& held) { return held.frame.meta.pushed_ns; })
      .def_property_readonly("width", [](const Held& held) { return held.frame.meta.width; })
      .def_property_readonly("height", [](const Held& held) { return held.frame.meta.height; })
      .def_property_readonly("format", [](const Held& held) { return held.frame.meta.format; })
      .def_property_readonly("sample_rate", [](const Held& held) { return held.frame.meta.sample_rate; })
      .def_property_readonly("frame", [](const py::object& self) {
        const auto& held = self.cast<Held&>();
        return view<std::uint8_t>(self, held.reader->segment().frame(held.frame.slot), held.frame.meta.frame_bytes);
      })
      .def_property_readonly("audio", [](const py::object& self) {
        const auto& held = self.cast<Held&>();
        return view<float>(self, held.reader->segment().audio(held.frame.slot), held.frame.meta.audio_bytes);
      });
}

}  // namespace

void bind_frame_ring(py::module_& m) {
  bind_ends(m);
  bind_slots(m);
  m.def("ring_create", &create, py::arg("slots"), py::arg("frame_bytes"), py::arg("audio_bytes"),
        py::arg("drop_oldest"), py::arg("writer"), "A new ring, this process being its writer or its reader.");
  m.def("ring_attach", &attach, py::arg("name"), py::arg("writer"), "The other end of a ring, by its name.");
}

}  // namespace liverelay
