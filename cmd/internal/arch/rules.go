package main

// module is the prefix of our own import paths.
const module = "github.com/ztun/ztun/"

// rows is the table of the design: an import goes from a higher row to a
// lower one, never to its own. The numbers of cmd/internal lie between 4 and
// 5 and order it within itself: what only reads or only translates is at the
// bottom, the lab, which runs everything, on top.
var rows = map[string]float64{
	"cmd/ztun":       5,
	"cmd/ztun-proxy": 5,
	"cmd/ztun-agent": 5,
	"cmd/ztun-cni":   5,

	"cmd/internal/arch":        4.9,
	"cmd/internal/bench":       4.9,
	"cmd/internal/meshtest":    4.9, // A mesh of real parts, for tests.
	"cmd/internal/soak":        4.9, // A test; its program is the test's.
	"cmd/internal/lab/demo":    4.8,
	"cmd/internal/lab":         4.7,
	"cmd/internal/proxy":       4.6,
	"cmd/internal/enrol":       4.6,
	"cmd/internal/enrol/marks": 4.1,
	"cmd/internal/agent":       4.5,
	"cmd/internal/admin":       4.4,
	"cmd/internal/cni":         4.4,
	"cmd/internal/telemetry":   4.3,
	"cmd/internal/standin":     4.3,
	"cmd/internal/zds":         4.2,
	"cmd/internal/lab/wire":    4.1,
	"cmd/internal/lab/echo":    4.1,
	"cmd/internal/cni/wire":    4.1,
	"cmd/internal/zds/zdsapi":  4.1,
	"cmd/internal/procs":       4.1,
	"cmd/internal/owner":       4.05,
	"cmd/internal/socket":      4.05,
	"cmd/internal/config":      4,

	"tunnel":       3,
	"netstack/dns": 3,
	"xds/control":  3,

	"netstack":     2,
	"tunnel/hbone": 2,
	"xds/mesh":     2,
	"tun/podnet":   2,

	"tun":          1,
	"tunnel/h2":    1,
	"tunnel/certs": 1,
	"xds":          1,
	"xds/authz":    1,

	"tunnel/complaints": 0,
	"tunnel/identity":   0,
	"tunnel/splice":     0,
	"tunnel/token":      0,
	"xds/workloadapi":   0,
	"xds/securityapi":   0,
}

// alone are the packages that import nothing of ours.
var alone = []string{"cmd/internal/config", "cmd/internal/arch", "cmd/internal/socket", "tunnel/complaints", "tunnel/identity", "tunnel/splice", "tunnel/token", "xds/workloadapi", "xds/securityapi"}

// A vocabulary is a foreign module, or a generated package of ours, and the
// only packages whose own files may import it. Tests may: the far end of
// a protocol is best played by somebody else's code.
type vocabulary struct {
	prefix  string
	allowed []string
}

var vocabularies = []vocabulary{
	{"gvisor.dev/gvisor", []string{"netstack"}},
	{"golang.org/x/net/http2", []string{"tunnel/h2"}},
	{"golang.zx2c4.com/wireguard", []string{"tun"}},
	{"github.com/vishvananda/netlink", []string{"tun", "tun/podnet", "cmd/internal/lab", "cmd/internal/procs"}},
	{"github.com/vishvananda/netns", []string{"tun", "tun/podnet", "cmd/internal/lab"}},
	{"google.golang.org/protobuf", []string{"xds", "xds/mesh", "xds/control", "xds/workloadapi", "xds/securityapi", "tunnel/certs", "cmd/internal/zds", "cmd/internal/zds/zdsapi"}},
	{"github.com/envoyproxy/go-control-plane", []string{"xds", "xds/control"}},
	{"google.golang.org/grpc", []string{"xds", "xds/control", "tunnel/certs"}},
	{"istio.io/api", []string{"xds/control", "tunnel/certs"}},
	{"k8s.io/client-go", []string{"cmd/internal/enrol", "cmd/ztun-agent"}},
	{"k8s.io/", []string{"xds/control", "cmd/internal/enrol", "cmd/internal/enrol/marks", "cmd/ztun-agent", "cmd/internal/lab"}},
	{"github.com/prometheus/client_golang", []string{"cmd/internal/telemetry", "cmd/internal/admin", "cmd/ztun-agent"}},
	{"github.com/containernetworking/cni", []string{"cmd/internal/cni", "cmd/ztun-cni"}},
	{"github.com/spf13/cobra", []string{"cmd/ztun", "cmd/ztun-proxy", "cmd/ztun-agent"}},
	{module + "xds/workloadapi", []string{"xds/mesh", "xds/control"}},
	{module + "xds/securityapi", []string{"xds/mesh", "xds/control", "xds/authz"}},
	{module + "cmd/internal/zds/zdsapi", []string{"cmd/internal/zds"}},
}
