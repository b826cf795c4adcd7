-- wrk's side of `outrider bench`: requests from a file (bench.traffic.write_raw), results as one line of JSON.
-- wrk ... -s closed.lua URL -- FILE
local requests, at = {}, 0

function init(args)
   local file = assert(io.open(args[1], "rb"))
   while true do
      local head = file:read(4)
      if not head then break end
      local a, b, c, d = head:byte(1, 4)
      requests[#requests + 1] = file:read(a + b * 256 + c * 65536 + d * 16777216)
   end
   file:close()
   math.randomseed(os.time())
   at = math.random(#requests)
end

function request()
   at = at % #requests + 1
   return requests[at]
end

function done(summary, latency, _)
   local e, points = summary.errors, {}
   -- the share above each point falls by a tenth of a decade from step to step
   for step = 0, 50 do
      local p = 100 * (1 - 10 ^ (-step / 10))
      points[#points + 1] = string.format("[%.5f,%d]", p, latency:percentile(p))
   end
   io.write(string.format(
      'RESULT {"requests":%d,"duration_us":%d,"non2xx":%d,"socket_errors":%d,"timeouts":%d,"p50_us":%d,' ..
      '"p99_us":%d,"p999_us":%d,"max_us":%d,"points":[%s]}\n',
      summary.requests, summary.duration, e.status, e.connect + e.read + e.write, e.timeout,
      latency:percentile(50), latency:percentile(99), latency:percentile(99.9), latency.max,
      table.concat(points, ",")))
end
