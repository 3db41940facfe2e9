#include "stage_loop.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace liverelay {
namespace {

constexpr std::int64_t kLookNs = 150000;  // a sleeper may wake up as late as this
constexpr std::int64_t kPollNs = 50000;   // between two looks at a device that computes for many milliseconds
constexpr int kWatchParts = 4;            // looks at the clock within the bound

void nap_until(std::int64_t when) {
  timespec time{};
  time.tv_sec = static_cast<time_t>(when / 1000000000);
  time.tv_nsec = static_cast<long>(when % 1000000000);
  while (::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, nullptr) != 0) {
  }
}

}  // namespace

std::int64_t now_ns() {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

void sleep_until_ns(std::int64_t when) {
  if (when - now_ns() > kLookNs) nap_until(when - kLookNs);
  while (now_ns() < when) {
  }
}

bool StageLoop::put(std::uint64_t id, std::shared_ptr<const Program> program) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (ended_) return false;
    inbox_.push_back({id, std::move(program)});
  }
  asked_.notify_one();
  return true;
}

void StageLoop::stop() { put(0, nullptr); }

void StageLoop::cancel() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
  }
  asked_.notify_one();
}

bool StageLoop::next(Job& job) {
  since_ns_.store(0);
  std::unique_lock<std::mutex> lock(mutex_);
  asked_.wait(lock, [&] { return !inbox_.empty() || cancelled_; });
  if (cancelled_) return false;
  job = std::move(inbox_.front());
  inbox_.pop_front();
  return job.program != nullptr;
}

RunEnd StageLoop::run(int device, CudaStream stream) {
  device_ = device;
  stream_ = stream;
  if (device_ != kHost) cuda_check(cuda().set_device(device_), "cudaSetDevice");
  for (Job job; next(job);) {
    Told told;
    told.id = job.id;
    told.asked_ns = told.begun_ns = now_ns();
    told.program = current_ = std::move(job.program);
    for (const Op& op : *current_) {
      if (!perform(op, told)) {
        since_ns_.store(0);
        return end_;
      }
    }
    told.ended_ns = now_ns();
    if (told.computed_ns == 0) told.computed_ns = told.ended_ns;
    current_ = nullptr;  // before it is told: whoever takes it lets go of it last
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_.push_back(std::move(told));
    }
    told_.notify_one();
  }
  settle(0);
  return RunEnd::stopped;
}

bool StageLoop::perform(const Op& op, Told& told) {
  const bool gpu = device_ != kHost;
  switch (op.kind) {
    case OpKind::receive:
    case OpKind::send:
      end_ = RunEnd::closed;
      return op.kind == OpKind::send ? op.link->send(op.parts, stream_) : op.link->receive(op.parts, stream_);
    case OpKind::begun:
      if (!launched_.empty()) since_ns_.store(now_ns());
      settle(static_cast<std::size_t>(ahead_));
      told.begun_ns = now_ns();
      since_ns_.store(told.begun_ns);
      if (gpu) {
        const auto event = std::make_shared<Event>(device_, 0);
        event->record(stream_);
        told.started = event;
      }
      return true;
    case OpKind::computed:
      told.computed_ns = now_ns();
      if (gpu && told.started != nullptr) {
        const auto event = std::make_shared<Event>(device_, 0);
        event->record(stream_);
        told.finished = event;
        launched_.push_back(event);
      }
      return true;
    case OpKind::call:
      end_ = RunEnd::called_off;
      return !told.fault.empty() || op.call();
    default:
      if (told.fault.empty()) compute(op, told);
      return true;
  }
}

void StageLoop::compute(const Op& op, Told& told) {
  try {
    if (op.kind == OpKind::copy) copy_bytes(op.target, op.source, op.bytes, device_ != kHost, stream_);
    else if (op.kind == OpKind::launch) cuda_check(cuda().graph_launch(op.target, stream_), "cudaGraphLaunch");
    else sleep_until_ns(now_ns() + op.ns);
  } catch (const CudaError& error) {
    told.fault = error.what();
  }
}

void StageLoop::settle(std::size_t left) {
  while (launched_.size() > left) {
    cuda_check(cuda().event_synchronize(launched_.front()->get()), "cudaEventSynchronize");
    launched_.pop_front();
  }
}

std::vector<std::shared_ptr<const Program>> StageLoop::end() {
  std::vector<std::shared_ptr<const Program>> left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    left.push_back(std::move(current_));
    for (Job& job : inbox_) left.push_back(std::move(job.program));
    inbox_.clear();
  }
  told_.notify_one();
  return left;
}

Took StageLoop::take(Told& out) {
  const auto slice = std::chrono::nanoseconds(bound_ns_ / kWatchParts);
  const auto due = [&] { return !done_.empty() || ended_; };
  while (!holding_) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (bound_ns_ == 0) told_.wait(lock, due);
      else told_.wait_for(lock, slice, due);
      if (!done_.empty()) {
        held_ = std::move(done_.front());
        done_.pop_front();
        holding_ = true;
      } else if (ended_) {
        return Took::ended;
      }
    }
    if (!holding_ && overdue(out)) return Took::overdue;
  }
  device_since_ns_.store(held_.finished != nullptr ? held_.begun_ns : 0);
  while (!computed(held_)) {
    if (overdue(out)) return Took::overdue;
    nap_until(now_ns() + kPollNs);
  }
  device_since_ns_.store(0);
  holding_ = false;
  out = std::move(held_);
  held_ = {};
  return Took::told;
}

bool StageLoop::overdue(Told& out) {
  const std::int64_t since = working_since_ns();
  if (bound_ns_ == 0 || since == 0 || since == reported_ns_ || now_ns() - since < bound_ns_) return false;
  out = {};
  out.asked_ns = reported_ns_ = since;
  return true;
}

bool StageLoop::computed(Told& told) {
  if (told.finished == nullptr) return true;
  const int status = cuda().event_query(told.finished->get());
  if (status == kCudaNotReady) return false;
  cuda_check(status, "the device");
  float ms = 0;
  cuda_check(cuda().event_elapsed(&ms, told.started->get(), told.finished->get()), "cudaEventElapsedTime");
  told.computed_ns = told.ended_ns = std::max(told.ended_ns, now_ns());
  told.begun_ns = told.computed_ns - static_cast<std::int64_t>(1e6 * static_cast<double>(ms));
  return true;
}

std::int64_t StageLoop::working_since_ns() const {
  const std::int64_t loop = since_ns_.load(), device = device_since_ns_.load();
  return loop == 0 || (device != 0 && device < loop) ? device : loop;
}

}  // namespace liverelay
