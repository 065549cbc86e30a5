// Smallest test support: named cases, checks that report values, a count of failures.
#pragma once

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "core/error.h"

namespace rapshee::testing {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

// A failed check ends its case.
struct Failure {
  std::string message;
};

template <class... Parts>
void check(bool holds, const char* file, int line, const Parts&... parts) {
  if (!holds) throw Failure{concat(file, ":", line, ": ", parts...)};
}

template <class Got, class Expected>
void check_equal(const Got& got, const Expected& expected, const char* file, int line,
                 const char* text) {
  check(got == expected, file, line, text, ": got ", got, ", expected ", expected);
}

template <class E, class F>
std::string message_of(const char* file, int line, F&& body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  }
  throw Failure{concat(file, ":", line, ": nothing was thrown")};
}

inline bool run_case(const Case& test) {
  std::string problem;
  try {
    test.body();
  } catch (const Failure& failure) {
    problem = failure.message;
  } catch (const std::exception& error) {
    problem = concat("threw: ", error.what());
  }
  std::printf("%s %s%s%s\n", problem.empty() ? "ok    " : "FAILED", test.name,
              problem.empty() ? "" : "\n       ", problem.c_str());
  return problem.empty();
}

inline int run_all() {
  int failed = 0;
  for (const Case& test : cases()) failed += run_case(test) ? 0 : 1;
  std::printf("%zu cases, %d failed\n", cases().size(), failed);
  return cases().empty() || failed > 0 ? 1 : 0;
}

}  // namespace rapshee::testing

#define TEST_CASE(name)                                                           \
  static void name();                                                             \
  static const ::rapshee::testing::Registration registration_##name(#name, name); \
  static void name()

#define CHECK(condition) \
  ::rapshee::testing::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

#define CHECK_EQ(got, expected) \
  ::rapshee::testing::check_equal((got), (expected), __FILE__, __LINE__, #got)

// The message of the E that `expression` throws; fails if it throws nothing.
#define MESSAGE_OF(E, expression) \
  ::rapshee::testing::message_of<E>(__FILE__, __LINE__, [&] { expression; })

#define TEST_MAIN() \
  int main() { return ::rapshee::testing::run_all(); }
