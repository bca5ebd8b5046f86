package soak

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/tuntest"
)

func TestMain(m *testing.M) { netnstest.MainLeaks(m) }

var (
	minutes = flag.Float64("minutes", 0, "how long to soak; 0: every kind of connection once in each world")
	seedArg = flag.Uint64("seed", 0, "seed of the load; 0: a new one")
	only    = flag.String("only", "", "soak in those worlds and weathers only, by `regexp`")
	kindArg = flag.String("kinds", "", "only those kinds of connections, by `regexp`")
	rack    = flag.Bool("rack", false, "with RACK")
	noSACK  = flag.Bool("nosack", false, "without SACK")
	podCC   = flag.String("pod", "", "congestion control of the legs to the apps: reno or cubic")
	netCC   = flag.String("network", "", "congestion control of the legs to the network: reno or cubic")
	verbose = flag.Bool("states", false, "with a line tell of the last few connections")
	period  = flag.Duration("period", 10*time.Second, "print a line this often")
)

const (
	// dialLimit is what a dial may take: a SYN is repeated after 1, 3 and 7 s,
	// and it is one or two handshakes.
	dialLimit = 20 * time.Second
	// stallLimit is what a connection may stand still; a test among others on a
	// busy machine is patient.
	stallLimit   = 5 * time.Second
	patientLimit = 20 * time.Second
)

// A scene is a world and its weather.
type scene struct {
	name string
	here land
	sky  weather
}

// A land is a world whose weather can be set.
type land interface {
	world
	set(ab, ba tuntest.Path)
	flows() int
	forget()
	state() string
}

// worldOptions say what a world is made of.
type worldOptions struct {
	wired bool // a wire, or nothing, in between
	seed  uint64
	tcp   netstack.TCP
	serve func(first uint64, c conn) // takes what servers accept
}

// A run is one soak.
type run struct {
	t      *testing.T
	seed   uint64
	short  bool
	begin  time.Time
	watch  *watch
	tally  tally
	kinds  func(kind) bool
	lost   time.Duration // Owned by lines.
	scenes []scene
	// now is the load that servers belong to.
	now atomic.Pointer[load]
	// where is the scene that is on.
	where atomic.Pointer[scene]

	// mu guards the fields below.
	mu     sync.Mutex
	failed []string
	dumped bool
}

func TestSoak(t *testing.T) {
	r := &run{t: t, seed: *seedArg, short: *minutes == 0, begin: time.Now()}
	if r.seed == 0 {
		r.seed = uint64(time.Now().UnixNano()) & 0xffffff
	}
	limit := stallLimit
	if r.short {
		limit = patientLimit
	}
	r.watch = newWatch(limit, dialLimit+limit, r.stalled)
	defer r.watch.close()
	r.build()
	r.say("seed %d: -seed %d repeats it", r.seed, r.seed)
	stop := r.lines()
	r.soak()
	stop()
	r.summary()
}

// build makes the worlds.
func (r *run) build() {
	serve := func(first uint64, c conn) {
		if l := r.now.Load(); l != nil {
			l.serve(first, c)
			return
		}
		c.Reset()
	}
	add := func(name string, here land, skies ...weather) {
		for _, sky := range skies {
			r.scenes = append(r.scenes, scene{name + ": " + sky.name, here, sky})
		}
	}
	o := worldOptions{seed: r.seed, tcp: netstack.TCP{RACK: *rack, NoSACK: *noSACK, Pod: *podCC, Network: *netCC}, serve: serve}
	add("mesh", newMeshWorld(r.t, o), calm)
	add("memory", newMemoryWorld(r.t, o), calm)
	o.wired = true
	add("mesh over a wire", newMeshWorld(r.t, o), weathers...)
	add("memory over a wire", newMemoryWorld(r.t, o), weathers...)
	match, kinds := regexp.MustCompile(*only), regexp.MustCompile(*kindArg)
	r.kinds = func(k kind) bool { return kinds.MatchString(k.String()) }
	kept := r.scenes[:0]
	for _, s := range r.scenes {
		if match.MatchString(s.name) {
			kept = append(kept, s)
		}
	}
	if r.scenes = kept; len(kept) == 0 {
		r.t.Fatalf("no scene matches %q", *only)
	}
}

// soak goes through the scenes, again and again. What the process holds once
// every world has had a load is what it must come back to.
func (r *run) soak() {
	rng := rand.New(rand.NewPCG(r.seed, 0))
	scenes, epoch := r.scenes, 15*time.Second
	if r.short {
		scenes, epoch = r.sample(rng), 0 // one deck each
	}
	var first level
	next := uint64(1)
	for _, s := range r.worlds(scenes) {
		next = r.warm(s, next)
		if !r.short {
			next = r.epoch(s, next, 0)
		}
		first = first.most(settle(0, r.flows, nil))
	}
	r.say("  %v", first)
	end := r.begin.Add(time.Duration(*minutes * float64(time.Minute)))
	for round := 0; !r.over() && (r.short && round == 0 || time.Now().Before(end)); round++ {
		for _, i := range rng.Perm(len(scenes)) {
			s := &scenes[i]
			next = r.epoch(s, next, epoch)
			now := settle(30*time.Second, r.flows, func(l level) bool { return l.above(first) == "" })
			r.say("  %v", now)
			if bad := now.above(first); bad != "" {
				r.fail(fmt.Errorf("these have not come back: %s\n%s", bad, r.state(true)))
				return
			}
			if r.over() || !r.short && time.Now().After(end) {
				return
			}
		}
	}
}

// warm opens a connection along each route, so that tunnels and the like are
// there, and returns the number of the connection after the last.
func (r *run) warm(s *scene, next uint64) uint64 {
	l := r.load(s, next)
	for route := range s.here.routes() {
		l.connection(deal{id: next, kind: short, route: route})
		next++
	}
	return next
}

// worlds returns one scene of each world.
func (r *run) worlds(scenes []scene) (list []*scene) {
	seen := map[land]bool{}
	for i := range scenes {
		if s := &scenes[i]; !seen[s.here] {
			seen[s.here] = true
			list = append(list, s)
		}
	}
	return list
}

// sample picks a few scenes, with a smaller load.
func (r *run) sample(rng *rand.Rand) (list []scene) {
	want := map[string]int{"mesh over a wire": 2, "mesh": 1, "memory over a wire": 1, "memory": 1}
	for _, i := range rng.Perm(len(r.scenes)) {
		s := r.scenes[i]
		name, _, _ := strings.Cut(s.name, ":")
		if want[name]--; want[name] >= 0 || *only != "" {
			s.sky.load = measure{bulk: min(s.sky.load.bulk, 1<<20), rest: 300 * ms, idle: 500 * ms}
			list = append(list, s)
		}
	}
	return list
}

// epoch puts a load on a scene, and returns the number of the connection after
// its last.
func (r *run) epoch(s *scene, first uint64, d time.Duration) uint64 {
	s.here.set(s.sky.ab, s.sky.ba)
	l := r.load(s, first)
	l.run(s.sky.workers, d)
	s.here.set(tuntest.Path{}, tuntest.Path{})
	s.here.forget()
	return l.deck.last()
}

// load makes the load of a scene, which servers belong to from now on.
func (r *run) load(s *scene, first uint64) *load {
	l := &load{
		world: s.here, deck: newDeck(r.seed, first, len(s.here.routes()), r.kinds), watch: r.watch,
		measure: s.sky.load, tally: &r.tally, failed: r.fail, plays: map[uint64]*play{},
	}
	r.where.Store(s)
	r.now.Store(l)
	return l
}

func (r *run) flows() (n int) {
	for _, s := range r.worlds(r.scenes) {
		n += s.here.flows()
	}
	return n
}

// say prints a line: at once in a long run, with the test's output in a short one.
func (r *run) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	if r.short {
		r.t.Log(line)
		return
	}
	fmt.Fprintf(os.Stdout, "%7.1fs  %s\n", time.Since(r.begin).Seconds(), line)
}

func (r *run) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	scene := ""
	if s := r.where.Load(); s != nil {
		scene = s.name + ": "
	}
	r.failed = append(r.failed, err.Error())
	if len(r.failed) <= 20 {
		r.t.Errorf("%s%v", scene, err)
		if !r.short {
			fmt.Fprintf(os.Stdout, "FAIL %s%v\n", scene, err)
		}
	}
}

// over says that going on would tell nothing new.
func (r *run) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failed) >= 20
}

// stalled tells all about the first stall, and ends each.
func (r *run) stalled(p *play) {
	r.mu.Lock()
	first := !r.dumped
	r.dumped = true
	r.mu.Unlock()
	if first {
		fmt.Fprintf(os.Stdout, "%s\n%s", p.failure(), r.state(true))
	}
	p.kill()
}

// state is what is known of the world that is on, and of the process.
func (r *run) state(stacks bool) string {
	var s strings.Builder
	if here := r.where.Load(); here != nil {
		s.WriteString(here.here.state())
	}
	n := 0
	r.watch.live(func(p *play) {
		if n++; n <= 100 {
			s.WriteString(p.state())
		}
	})
	fmt.Fprintf(&s, "  %d connections live\n", n)
	if stacks {
		s.WriteString(goroutines())
	}
	return s.String()
}

// lines prints one each period, until stop is called.
func (r *run) lines() (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(*period)
		defer t.Stop()
		for {
			select {
			case <-quit:
				return
			case <-t.C:
				r.line()
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

func (r *run) line() {
	live := 0
	r.watch.live(func(*play) { live++ })
	if *verbose && live < 4 {
		r.watch.live(func(p *play) { fmt.Print(p.state()) })
	}
	where := ""
	if s := r.where.Load(); s != nil {
		where = s.name
	}
	opened, ended := r.connections()
	r.say("%-60s %5d live, %7d opened, %7d ended, %8.1f MiB, %d cut by policy, %2.0f %% starved, %d failures", where, live, opened, ended, float64(r.tally.bytes.Load())/(1<<20), r.tally.cut.Load(), r.starved(), r.failures())
}

// starved is the part of the last period in which others had the processors.
func (r *run) starved() float64 {
	lost := time.Duration(r.watch.lost.Load())
	defer func() { r.lost = lost }()
	return float64(lost-r.lost) / float64(*period) * 100
}

func (r *run) connections() (opened, ended int64) {
	for k := range kinds {
		opened += r.tally.opened[k].Load()
		ended += r.tally.ended[k].Load()
	}
	return opened, ended
}

func (r *run) failures() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failed)
}

func (r *run) summary() {
	for k := range kinds {
		r.say("%-14v %7d", kind(k), r.tally.ended[k].Load())
	}
	for _, s := range r.worlds(r.scenes) {
		r.say("%s\n%s", s.name, s.here.state())
	}
	_, ended := r.connections()
	r.say("seed %d: %d connections, %.1f MiB checked, %d failures", r.seed, ended, float64(r.tally.bytes.Load())/(1<<20), r.failures())
}
