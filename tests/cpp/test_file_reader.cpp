#include "core/file_reader.h"

#include <sys/stat.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "temp_folder.h"

namespace rapshee {
namespace {

using testing::TempFolder;

std::string read_text(const FileReader& file, int64_t offset, size_t bytes) {
  std::string text(bytes, '?');
  file.read(offset, std::as_writable_bytes(std::span(text)));
  return text;
}

TEST_CASE(reads_what_is_inside) {
  const TempFolder folder;
  const FileReader file(folder.write("a.bin", "0123456789"));
  CHECK_EQ(file.size(), 10);
  CHECK_EQ(read_text(file, 0, 10), "0123456789");
  CHECK_EQ(read_text(file, 9, 1), "9");
  CHECK_EQ(read_text(file, 10, 0), "");
}

TEST_CASE(refuses_what_is_outside) {
  const TempFolder folder;
  const FileReader file(folder.write("a.bin", "0123456789"));
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  const std::pair<int64_t, size_t> outside[] = {{10, 1}, {0, 11}, {11, 0}, {-1, 1}, {kMax, 2}};
  for (const auto& [offset, bytes] : outside) {
    const std::string message = MESSAGE_OF(WeightError, read_text(file, offset, bytes));
    CHECK(message.find("a.bin") != std::string::npos);
    CHECK(message.find("outside") != std::string::npos);
  }
}

TEST_CASE(a_file_that_shrinks_is_an_error) {
  const TempFolder folder;
  const FileReader file(folder.write("a.bin", "0123456789"));
  std::filesystem::resize_file(file.path(), 4);
  CHECK_EQ(read_text(file, 0, 4), "0123");
  CHECK(MESSAGE_OF(WeightError, read_text(file, 2, 5)).find("ends at byte 4") != std::string::npos);
}

TEST_CASE(only_regular_files_are_opened) {
  const TempFolder folder;
  const std::string pipe = folder.path() + "/pipe";
  CHECK_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  for (const std::string& path : {folder.path(), pipe}) {
    const std::string message = MESSAGE_OF(WeightError, FileReader{path});
    CHECK_EQ(message, path + ": not a regular file");
  }
  const std::string missing = folder.path() + "/missing";
  CHECK_EQ(MESSAGE_OF(WeightError, FileReader{missing}).find(missing + ": cannot open"), 0u);
}

TEST_CASE(moves_hand_the_file_over) {
  const TempFolder folder;
  FileReader first(folder.write("a.bin", "first"));
  FileReader second(folder.write("b.bin", "second"));
  second = std::move(first);
  const FileReader third(std::move(second));
  CHECK_EQ(read_text(third, 0, 5), "first");
}

TEST_CASE(threads_may_read_at_once) {
  const TempFolder folder;
  std::string content(1 << 16, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 31 >> 3);
  const FileReader file(folder.write("a.bin", content));
  std::array<std::string, 4> parts;
  std::vector<std::thread> threads;
  const size_t quarter = content.size() / parts.size();
  for (size_t i = 0; i < parts.size(); ++i) {
    threads.emplace_back(
        [&, i] { parts[i] = read_text(file, static_cast<int64_t>(i * quarter), quarter); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(parts[0] + parts[1] + parts[2] + parts[3] == content);
}

}  // namespace
}  // namespace rapshee

TEST_MAIN()
