package procs

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/netnstest"
)

// node is a host with a pod beside it.
type node struct {
	t         *testing.T
	host, pod *netnstest.NS
	owners    *Owners
}

// newNode asks about the host with the processes that proc shows.
func newNode(t *testing.T, proc string) *node {
	t.Helper()
	n := &node{t: t, host: netnstest.New(t, "host"), pod: netnstest.New(t, "pod")}
	netnstest.Veth(t, n.host, "veth", n.pod, "eth0")
	n.host.Addr("veth", "10.0.0.254/24", "fd00::fe/64")
	n.pod.Addr("eth0", "10.0.0.1/24", "fd00::1/64")
	n.host.Settled()
	n.pod.Settled()
	var err error
	if n.owners, err = NewOwners(n.host.File(), proc); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.owners.Close)
	return n
}

// want checks who owns the host's end of a connection.
func (n *node) want(what string, local, remote netip.AddrPort, want Owner) {
	n.t.Helper()
	got, err := n.owners.Of(local, remote)
	if err != nil || got != want {
		n.t.Errorf("%s: %v to %v is of %v, %v, want %v", what, local, remote, got, err, want)
	}
}

// dial connects the host to a pod's listener.
func (n *node) dial(to string) (c *net.TCPConn, local, remote netip.AddrPort) {
	n.t.Helper()
	l := n.pod.Listen("tcp", to)
	conn, err := n.host.Dial("tcp", l.Addr().String(), 10*time.Second)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn), addrPortOf(conn.LocalAddr()), addrPortOf(conn.RemoteAddr())
}

func addrPortOf(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// fileOf is a duplicate of a connection's socket.
func fileOf(t *testing.T, c *net.TCPConn) *os.File {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestOwnerByProcess(t *testing.T) {
	n := newNode(t, "/proc")
	for _, to := range []string{"10.0.0.1:0", "[fd00::1]:0"} {
		mine, local, remote := n.dial(to)
		n.want("no kubelet anywhere", local, remote, OwnerUnknown)
		theirs, local2, remote2 := n.dial(to)
		kubelet := running(t, n.host, "kubelet", fileOf(t, theirs))
		n.owners.kubelets.scanned = time.Time{} // As if much later.
		n.want("the kubelet's", local2, remote2, OwnerKubelet)
		n.want("another process'", local, remote, OwnerLocal)
		_ = mine
		end(kubelet)
		n.want("of a kubelet that ended", local2, remote2, OwnerUnknown)
	}
}

func TestKubeletThatStartsLaterIsFound(t *testing.T) {
	for i, name := range kubeletNames {
		n := newNode(t, "/proc")
		c, local, remote := n.dial("10.0.0.1:0")
		running(t, n.host, "kubelet") // The one before it.
		n.want("another process'", local, remote, OwnerLocal)
		if i > 0 {
			n.owners.kubelets.scanned = time.Time{} // One wait is enough.
		}
		running(t, n.host, name, fileOf(t, c))
		netnstest.Eventually(t, name+" is found", func() bool {
			o, err := n.owners.Of(local, remote)
			return err == nil && o == OwnerKubelet
		})
	}
}

// A pod on the host's network may call its program as it likes.
func TestPodsProcessIsNoKubelet(t *testing.T) {
	n := newNode(t, "/proc")
	c, local, remote := n.dial("10.0.0.1:0")
	real := running(t, n.host, "kubelet")
	spoof := running(t, n.host, "kubelet", fileOf(t, c))
	enterCgroup(t, spoof.Process.Pid, "/kubepods/pod"+uidA+"/"+idA)
	t.Cleanup(func() { end(spoof) })
	n.want("a pod's", local, remote, OwnerLocal)
	end(real)
	running(t, n.pod, "kubelet") // That of another host.
	n.owners.kubelets.scanned = time.Time{}
	n.want("a pod's, and no kubelet of this host", local, remote, OwnerUnknown)
}

func TestNobodyOwns(t *testing.T) {
	n := newNode(t, "/proc")
	c, local, remote := n.dial("10.0.0.1:0")
	other := func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr(), a.Port()^1) }
	n.want("the connection itself", local, remote, OwnerUnknown)
	n.want("another port of the host", other(local), remote, OwnerNone)
	n.want("another port of the pod", local, other(remote), OwnerNone)
	n.want("another pod", local, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), remote.Port()), OwnerNone)
	n.want("the other way round", remote, local, OwnerNone)
	l := n.host.Listen("tcp", "10.0.0.254:0")
	n.want("a listener", addrPortOf(l.Addr()), remote, OwnerNone)
	// In its own namespace it is the pod's, not the host's.
	inPod, err := n.pod.Dial("tcp", l.Addr().String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer inPod.Close()
	n.want("a pod's socket", addrPortOf(inPod.LocalAddr()), addrPortOf(inPod.RemoteAddr()), OwnerNone)
	// TIME_WAIT is nobody's.
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	n.want("one that is over", local, remote, OwnerNone)
	_ = c.Close()
	n.want("one that is gone", local, remote, OwnerNone)
}

// What the host forwards has no socket there, not even under the host's
// own address (kube-proxy's masquerading).
func TestForwardedFlowIsNobodys(t *testing.T) {
	n := newNode(t, "/proc")
	client := netnstest.New(t, "client")
	netnstest.Veth(t, n.host, "other", client, "eth0")
	n.host.Addr("other", "10.1.0.254/24")
	client.Addr("eth0", "10.1.0.1/24")
	client.Route("0.0.0.0/0", "10.1.0.254", "eth0")
	n.pod.Route("0.0.0.0/0", "10.0.0.254", "eth0")
	n.host.SetSysctl("net/ipv4/ip_forward", "1")
	l := n.pod.Listen("tcp", "10.0.0.1:0")
	c, err := client.Dial("tcp", l.Addr().String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	local, remote := addrPortOf(c.LocalAddr()), addrPortOf(c.RemoteAddr())
	n.want("forwarded", local, remote, OwnerNone)
	n.want("masqueraded", netip.AddrPortFrom(netip.MustParseAddr("10.0.0.254"), local.Port()), remote, OwnerNone)
}

// A probe's SYN is asked about before it is answered.
func TestSocketThatIsConnecting(t *testing.T) {
	n := newNode(t, "/proc")
	n.pod.Down("eth0") // Nobody answers.
	n.host.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 0, 0, 254}}); err != nil {
			t.Fatal(err)
		}
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 0, 0, 1}, Port: 80})
		if !errors.Is(err, unix.EINPROGRESS) {
			t.Fatal(err)
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		local := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.254"), uint16(sa.(*unix.SockaddrInet4).Port))
		n.want("SYN_SENT", local, netip.MustParseAddrPort("10.0.0.1:80"), OwnerUnknown)
	})
}

// A program may use an IPv6 socket for IPv4.
func TestMappedSocket(t *testing.T) {
	n := newNode(t, "/proc")
	l := n.pod.Listen("tcp4", "10.0.0.1:0")
	n.host.Do(func() {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		to := addrPortOf(l.Addr())
		if err := unix.Connect(fd, &unix.SockaddrInet6{Addr: netip.AddrFrom16(to.Addr().As16()).As16(), Port: int(to.Port())}); err != nil {
			t.Fatal(err)
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		own := sa.(*unix.SockaddrInet6)
		local := netip.AddrPortFrom(netip.AddrFrom16(own.Addr), uint16(own.Port))
		n.want("mapped", local, to, OwnerUnknown)
		n.want("unmapped", netip.AddrPortFrom(local.Addr().Unmap(), local.Port()), to, OwnerUnknown)
	})
}

// inodeOf is the socket's, as descriptors show it.
func inodeOf(t *testing.T, c *net.TCPConn) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(fileOf(t, c).Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// What the tables say decides, and what they cannot say is unknown.
func TestKubeletsOfATable(t *testing.T) {
	proc := newTable(t)
	n := newNode(t, proc.dir)
	c, local, remote := n.dial("10.0.0.1:0")
	rescan := func() { n.owners.kubelets.known, n.owners.kubelets.scanned = nil, time.Time{} }
	link := fmt.Sprintf("socket:[%d]", inodeOf(t, c))
	open := func(pid int, fd, to string) {
		proc.must(os.Symlink(to, filepath.Join(proc.dir, fmt.Sprint(pid), "fd", fd)))
	}
	proc.add(100, "sshd", 5, "0::/system.slice/sshd.service\n", n.host)
	open(100, "3", link)
	n.want("no kubelet", local, remote, OwnerUnknown)
	proc.add(200, "kubelet", 7, "0::/system.slice/kubelet.service\n", n.host)
	for i := range 700 {
		open(200, fmt.Sprint(i), "socket:[1]")
	}
	rescan()
	n.want("not the kubelet's", local, remote, OwnerLocal)
	open(200, "700", link)
	n.want("the kubelet's", local, remote, OwnerKubelet)
	// Its PID goes to another process, which has a socket of the same number.
	proc.write(200, "stat", statLine(200, "bash", 8))
	n.want("at once after", local, remote, OwnerUnknown)
	rescan()
	n.want("its PID is reused", local, remote, OwnerUnknown)
	proc.write(200, "stat", statLine(200, "kubelet", 9))
	rescan()
	n.want("another kubelet", local, remote, OwnerKubelet)
	proc.write(200, "cgroup", cgroupOf(uidA, idA)+cgroupOf(uidB, idA))
	rescan()
	n.want("one whose cgroups are not clear", local, remote, OwnerUnknown)
	proc.write(200, "stat", "garbage")
	proc.add(300, "k3s", 9, "0::/\n", n.host)
	rescan()
	n.want("beside a process that cannot be read", local, remote, OwnerUnknown)
	proc.remove(200)
	rescan()
	n.want("without it", local, remote, OwnerLocal)
	proc.must(os.RemoveAll(filepath.Join(proc.dir, "300/fd")))
	n.want("a kubelet that ends", local, remote, OwnerUnknown)
}

func TestOwnersRefuseNonsense(t *testing.T) {
	n := newNode(t, "/proc")
	for _, q := range [][2]netip.AddrPort{
		{},
		{netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("[fd00::1]:1")},
		{netip.MustParseAddrPort("10.0.0.1:1"), {}},
	} {
		if o, err := n.owners.Of(q[0], q[1]); err == nil || o != OwnerNone {
			t.Errorf("%v: %v, %v", q, o, err)
		}
	}
	n.owners.Close()
	if o, err := n.owners.Of(netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.1:1")); !errors.Is(err, os.ErrClosed) || o != OwnerNone {
		t.Errorf("after Close: %v, %v", o, err)
	}
}

func TestOnlyTheKubeletsOwnAndWhatCannotBeToldMayProbe(t *testing.T) {
	for o, want := range map[Owner]bool{OwnerNone: false, OwnerLocal: false, OwnerKubelet: true, OwnerUnknown: true, Owner(9): false} {
		if o.MayProbe() != want {
			t.Errorf("%v: %v, want %v", o, !want, want)
		}
	}
}
