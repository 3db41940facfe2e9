// stage_loop_test line JOBS SEED     a line of stages with random stalls: every byte, order and time is checked
// stage_loop_test close ROUNDS SEED  lines that are closed in the middle, and loops that a call ends: all threads end
//
// Built with LIVERELAY_SANITIZE=address or thread; tests/test_stage_loop_native.py runs it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "stage_loop.h"

using namespace liverelay;

namespace {

using Random = std::mt19937_64;
using Bytes = std::vector<std::uint8_t>;

#define REQUIRE(condition)                                                 \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

constexpr std::size_t kBlock = 96, kKept = 64;  // a stage keeps the first bytes of a block, and hands on those
constexpr std::int64_t kMillisecond = 1000000;

std::uint64_t below(Random& random, std::uint64_t limit) { return random() % limit; }

void stall(Random& random) {
  const std::uint64_t kind = below(random, 256);
  if (kind == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(random, 500)));
  else if (kind < 16) std::this_thread::yield();
}

std::uint8_t stamp(std::uint64_t block, std::size_t i, std::size_t stages) {
  return static_cast<std::uint8_t>(block * 31 + i * 7 + stages);
}

// A link with the memory of its buffers.
struct Way {
  std::vector<Bytes> memory{2, Bytes(kBlock)};
  std::shared_ptr<StageLink> link;
  Way() {
    link = std::make_shared<StageLink>(std::vector<std::uint8_t*>{memory[0].data(), memory[1].data()}, kBlock, kHost);
  }
};

Op link_op(OpKind kind, const std::shared_ptr<StageLink>& link, std::vector<Part> parts) {
  Op op;
  op.kind = kind;
  op.link = link;
  op.parts = std::move(parts);
  return op;
}

Op plain(OpKind kind) {
  Op op;
  op.kind = kind;
  return op;
}

Op call_op(Call call) {
  Op op;
  op.call = std::move(call);
  return op;
}

struct TestStage {
  Bytes own = Bytes(kBlock), copied = Bytes(kBlock);
  Random computing, taking, putting;  // one for each thread
  StageLoop loop{1, 5000 * kMillisecond};
  std::uint64_t calls = 0, told = 0;
  std::uint64_t ends_at = UINT64_MAX;  // the call that ends the loop

  // Adds one to every byte; the copy stands for what a GPU is given beside its graphs.
  std::shared_ptr<const Program> program(const Way& in, const Way& out) {
    auto made = std::make_shared<Program>();
    made->push_back(link_op(OpKind::receive, in.link, {{0, own.data(), kBlock}}));
    made->push_back(plain(OpKind::begun));
    made->push_back(call_op([this] {
      stall(computing);
      for (auto& byte : own) ++byte;
      return calls++ != ends_at;
    }));
    Op copy = plain(OpKind::copy);
    copy.target = copied.data();
    copy.source = own.data();
    copy.bytes = kBlock;
    made->push_back(copy);
    if (below(putting, 64) == 0) {
      made->push_back(plain(OpKind::sleep));
      made->back().ns = 50000;
    }
    made->push_back(plain(OpKind::computed));
    made->push_back(link_op(OpKind::send, out.link, {{0, copied.data(), kKept}, {kKept, own.data() + kKept, kBlock - kKept}}));
    return made;
  }

  void take_all() {
    Told told_of;
    std::int64_t before = 0;
    for (Took took; (took = loop.take(told_of)) != Took::ended;) {
      REQUIRE(took == Took::told);
      REQUIRE(told_of.id == told++ && told_of.fault.empty() && told_of.program != nullptr);
      REQUIRE(before <= told_of.asked_ns && told_of.asked_ns <= told_of.begun_ns);
      REQUIRE(told_of.begun_ns <= told_of.computed_ns && told_of.computed_ns <= told_of.ended_ns);
      before = told_of.ended_ns;
      stall(taking);
    }
  }
};

struct Line {
  std::vector<Way> ways;
  std::vector<std::unique_ptr<TestStage>> stages;
  std::vector<std::thread> threads;
  std::atomic<bool> watching{true};
  std::vector<RunEnd> ends;

  Line(std::size_t count, std::uint64_t seed) : ways(count + 1), ends(count, RunEnd::stopped) {
    for (std::size_t i = 0; i < count; ++i) {
      stages.push_back(std::make_unique<TestStage>());
      stages.back()->computing.seed(seed + i);
      stages.back()->taking.seed(~seed + i);
      stages.back()->putting.seed(seed ^ i);
    }
  }
  void start() {
    for (std::size_t i = 0; i < stages.size(); ++i) {
      TestStage* stage = stages[i].get();
      threads.emplace_back([this, stage, i] {
        ends[i] = stage->loop.run(kHost, nullptr);
        stage->loop.end();
        if (ends[i] == RunEnd::called_off) close();
      });
      threads.emplace_back([stage] { stage->take_all(); });
    }
    threads.emplace_back([this] {  // the watchdog
      while (watching) {
        for (const auto& stage : stages) REQUIRE(stage->loop.working_since_ns() <= now_ns());
        std::this_thread::yield();
      }
    });
  }
  bool put(std::uint64_t id) {
    bool all = true;
    for (std::size_t i = 0; i < stages.size(); ++i) {
      all = stages[i]->loop.put(id, stages[i]->program(ways[i], ways[i + 1])) && all;
    }
    return all;
  }
  void close() {
    for (const Way& way : ways) way.link->close();
  }
  void join() {
    watching = false;
    for (auto& thread : threads) thread.join();
  }
};

std::uint64_t check_all(Line& line, std::uint64_t seed) {
  Random random(seed);
  Bytes got(kBlock);
  std::uint64_t count = 0;
  while (line.ways.back().link->receive({{0, got.data(), kBlock}}, nullptr)) {
    for (std::size_t i = 0; i < kBlock; ++i) REQUIRE(got[i] == stamp(count, i, line.stages.size()));
    ++count;
    stall(random);
  }
  return count;
}

bool send_one(Line& line, std::uint64_t block) {
  Bytes given(kBlock);
  for (std::size_t i = 0; i < kBlock; ++i) given[i] = stamp(block, i, 0);
  return line.ways.front().link->send({{0, given.data(), kBlock}}, nullptr);
}

void whole_line(std::uint64_t jobs, std::uint64_t seed) {
  Random random(seed);
  Line line(2 + below(random, 4), seed);
  line.start();
  std::uint64_t arrived = 0;
  std::thread checker([&] { arrived = check_all(line, seed); });
  for (std::uint64_t id = 0; id < jobs; ++id) {
    REQUIRE(line.put(id) && send_one(line, id));
    stall(random);
  }
  for (auto& stage : line.stages) stage->loop.stop();
  for (std::size_t i = 0; i < 2 * line.stages.size(); ++i) line.threads[i].join();
  line.threads.erase(line.threads.begin(), line.threads.begin() + static_cast<std::ptrdiff_t>(2 * line.stages.size()));
  line.close();
  checker.join();
  line.join();
  for (std::size_t i = 0; i < line.stages.size(); ++i) {
    REQUIRE(line.ends[i] == RunEnd::stopped && line.stages[i]->told == jobs);
  }
  REQUIRE(arrived == jobs && !line.put(0));
  std::printf("%zu stages, %llu jobs\n", line.stages.size(), static_cast<unsigned long long>(jobs));
}

// One line that ends before its jobs do; how, is chance.
void cut(Random& random) {
  Line line(1 + below(random, 4), random());
  const std::uint64_t kind = below(random, 3), jobs = 1 + below(random, 200);
  if (kind == 0) line.stages[below(random, line.stages.size())]->ends_at = below(random, jobs);
  line.start();
  const std::uint64_t checker_seed = random();
  std::thread checker([&] { check_all(line, checker_seed); });
  std::thread closer([&line, kind, when = below(random, 3000)] {
    std::this_thread::sleep_for(std::chrono::microseconds(when));
    if (kind == 1) line.close();
    if (kind == 2) {
      for (auto& stage : line.stages) stage->loop.cancel();
      line.close();
    }
  });
  for (std::uint64_t id = 0; id < jobs; ++id) {
    line.put(id);
    if (!send_one(line, id)) break;
  }
  closer.join();
  if (kind == 0 || below(random, 2) == 0) line.close();
  for (auto& stage : line.stages) stage->loop.stop();
  line.close();
  checker.join();
  line.join();
}

void slow_job() {
  StageLoop loop(1, 20 * kMillisecond);
  auto program = std::make_shared<Program>();
  program->push_back(plain(OpKind::begun));
  program->push_back(plain(OpKind::sleep));
  program->back().ns = 200 * kMillisecond;
  loop.put(7, program);
  loop.stop();
  std::thread thread([&] {
    REQUIRE(loop.run(kHost, nullptr) == RunEnd::stopped);
    loop.end();
  });
  Told told;
  REQUIRE(loop.take(told) == Took::overdue && told.asked_ns != 0);
  const std::int64_t since = told.asked_ns;
  REQUIRE(loop.take(told) == Took::told && told.id == 7 && told.begun_ns == since);
  REQUIRE(told.ended_ns - told.begun_ns >= 200 * kMillisecond);
  REQUIRE(loop.take(told) == Took::ended);
  thread.join();
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return 2;
  const std::uint64_t amount = std::strtoull(arguments[2], nullptr, 10), seed = std::strtoull(arguments[3], nullptr, 10);
  if (std::string(arguments[1]) == "line") {
    whole_line(amount, seed);
    return 0;
  }
  Random random(seed);
  for (std::uint64_t i = 0; i < amount; ++i) cut(random);
  slow_job();
  std::printf("%llu lines were cut\n", static_cast<unsigned long long>(amount));
  return 0;
}
