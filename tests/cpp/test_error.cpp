#include "core/error.h"

#include <string>

#include "check.h"

namespace rapshee {
namespace {

TEST_CASE(a_check_reports_values_and_place) {
  const int got = 3;
  const std::string message =
      MESSAGE_OF(InvalidArgument, RAPSHEE_CHECK(got == 4, "rows: got ", got, ", expected ", 4));
  CHECK_EQ(message.find("rows: got 3, expected 4 [test_error.cpp:"), 0u);
}

TEST_CASE(a_check_that_holds_evaluates_nothing_else) {
  int evaluated = 0;
  RAPSHEE_CHECK(true, "count: ", ++evaluated);
  CHECK_EQ(evaluated, 0);
}

TEST_CASE(weight_errors_say_as_much_as_is_known) {
  const WeightError full("is cut off", "blk.0.attn_q.weight", "model.gguf");
  CHECK_EQ(std::string(full.what()), "model.gguf: tensor 'blk.0.attn_q.weight': is cut off");
  CHECK_EQ(full.reason(), "is cut off");
  CHECK_EQ(full.tensor(), "blk.0.attn_q.weight");
  CHECK_EQ(full.file(), "model.gguf");
  CHECK_EQ(std::string(WeightError("is cut off").what()), "is cut off");
  CHECK_EQ(std::string(WeightError("is cut off", "", "a").what()), "a: is cut off");
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
