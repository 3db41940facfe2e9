// The loop of one stage without Python: jobs in order, each a program that was prepared outside.
//
// One thread runs it (`run`), any thread puts jobs, one other thread takes what is told of them (`take`), so whoever is
// told holds up nobody. On a GPU the loop launches a job while the one before it is still computed; `take` waits for
// the events. A program holds no pointer to its loop, and is given back with what is told of its job.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_api.h"
#include "stage_link.h"

namespace liverelay {

// false: the loop ends at once, and nothing is told of the job.
using Call = std::function<bool()>;

enum class OpKind : std::uint8_t {
  receive,   // link, parts: the next block into the stage's memory
  begun,     // here the job's own work begins; waits until the device is no more than `ahead` jobs behind
  copy,      // target, source, bytes
  launch,    // target: a captured graph
  call,      // call: somebody else's code
  sleep,     // ns: a job of fixed time
  computed,  // here the job's own work ends
  send,      // link, parts: the block goes on, also one that failed, because a line's order is fixed
};

struct Op {
  OpKind kind = OpKind::call;
  std::shared_ptr<StageLink> link;
  std::vector<Part> parts;
  void* target = nullptr;
  const void* source = nullptr;
  std::size_t bytes = 0;
  std::int64_t ns = 0;
  Call call;
};
using Program = std::vector<Op>;

// What is told of a job. Times of CLOCK_MONOTONIC; on a GPU `begun` and `computed` are the device's.
struct Told {
  std::uint64_t id = 0;
  std::int64_t asked_ns = 0, begun_ns = 0, computed_ns = 0, ended_ns = 0;
  std::string fault;  // of a copy or a launch: the rest of the job's work was left out
  std::shared_ptr<const Program> program;
  std::shared_ptr<const Event> started, finished;
};

enum class RunEnd { stopped, closed, called_off };  // by `stop` or `cancel`; a link's end; a call
enum class Took { told, overdue, ended };

class StageLoop {
 public:
  // ahead: jobs that the device may be behind when another one is launched; bound_ns: of a job, for `take`; 0: none.
  explicit StageLoop(int ahead = 1, std::int64_t bound_ns = 0) : ahead_(ahead), bound_ns_(bound_ns) {}
  StageLoop(const StageLoop&) = delete;
  StageLoop& operator=(const StageLoop&) = delete;

  bool put(std::uint64_t id, std::shared_ptr<const Program> program);  // false once the loop has ended
  void stop();    // after the jobs that were put
  void cancel();  // after the job that is worked on; it may have to be woken through its links

  // The thread's body. device: kHost or a GPU's number. CudaError when a link or the device fails.
  RunEnd run(int device, CudaStream stream);
  // After `run`, or instead of it: nothing more will be told. Gives back what is left of jobs.
  std::vector<std::shared_ptr<const Program>> end();

  // Waits for the next thing to tell. overdue: `out.asked_ns` is since when a job has been worked on, longer than the
  // bound; said once. ended: all was told.
  Took take(Told& out);

  // When the job that is worked on was begun, 0 when there is none. For a watchdog: waits for nobody.
  std::int64_t working_since_ns() const;

 private:
  struct Job {
    std::uint64_t id = 0;
    std::shared_ptr<const Program> program;  // nothing: stop
  };

  bool next(Job& job);
  bool perform(const Op& op, Told& told);
  void compute(const Op& op, Told& told);
  void settle(std::size_t left);
  bool overdue(Told& out);
  bool computed(Told& told);

  const int ahead_;
  const std::int64_t bound_ns_;
  std::mutex mutex_;
  std::condition_variable asked_, told_;
  std::deque<Job> inbox_;
  std::deque<Told> done_;
  bool cancelled_ = false, ended_ = false;
  std::atomic<std::int64_t> since_ns_{0}, device_since_ns_{0};

  // Of the thread in `run`.
  int device_ = kHost;
  CudaStream stream_ = nullptr;
  RunEnd end_ = RunEnd::stopped;
  std::shared_ptr<const Program> current_;
  std::deque<std::shared_ptr<const Event>> launched_;

  // Of the thread in `take`.
  Told held_;
  bool holding_ = false;
  std::int64_t reported_ns_ = 0;
};

std::int64_t now_ns();
void sleep_until_ns(std::int64_t when);  // to some microseconds: sleeps, then looks

}  // namespace liverelay
