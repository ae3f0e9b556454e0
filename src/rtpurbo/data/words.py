"""English words for keys and needles."""

from itertools import product
from typing import Literal

Split = Literal["train", "test"]

ADJECTIVES: tuple[str, ...] = tuple(
    """
    amber ancient autumn bitter blue bold brave bright brisk broad bronze calm careful cheerful
    clear clever cold copper coral crimson crisp curious damp dapper dark deep distant dusty eager
    early elegant emerald faint fancy fearless fierce floral foggy fragrant frosty gentle giant
    gilded glad gleaming golden graceful grand gray green happy hollow honest humble
    icy indigo ivory jolly keen kind large late lazy lively lofty lonely loud loyal
    lucky mellow merry mighty misty modest narrow noble northern olive orange pale patient plain
    polished proud purple quick quiet rapid rare red restless rough round royal rustic salty
    scarlet shaded sharp shiny silent silver simple slender
    """.split()
)

NOUNS: tuple[str, ...] = tuple(
    """
    acorn anchor apple arrow badger balloon barrel basket beacon bell bicycle blanket boat
    bottle bridge broom bucket button cabin camel candle canyon carpet castle cedar cello chair
    cherry circle clock cloud comet compass cottage cradle crown curtain desert dolphin donkey
    drum eagle engine falcon feather fiddle flute forest fountain garden
    glacier goblet guitar hammer harbor hazel helmet heron hill island jacket kettle kite ladder
    lagoon lake lantern lemon lion lizard marble meadow mirror mountain needle orchard otter owl
    paddle palace parrot pebble pencil pepper piano pillow pine planet pony prairie puzzle rabbit
    raven ribbon river rocket saddle sail
    """.split()
)

# Disjoint from the words above, half of which are used in training; for evaluations that need thousands.

MORE_ADJECTIVES: tuple[str, ...] = tuple(
    """
    able absent abstract active actual acute adult agile airy alert alien alike alive ample angry
    annual antique apt arctic arid armed atomic awake aware awful awkward bald bare basic bent
    biblical big bleak blind blond blunt bony boring bound brief brittle broken brutal bulky bumpy
    busy candid capable casual central certain cheap chief chilly chronic chubby circular civic
    civil classic clumsy coarse coastal colossal comic common compact complex concrete content
    costly covert cozy cracked crucial cruel cubic curly curved cyclic daily decent deft delicate
    dense devout digital dim dire dizzy docile domestic double dramatic drowsy dry dual dubious dull
    durable dutiful easy edible educated elder electric eligible empty endless equal erect eternal
    ethical exact exotic expert express extra fabled factual fair faithful false famous feeble
    fertile fickle final finite firm fiscal flat flimsy fluent fluffy focal fond foolish formal
    fragile frail frank free frequent fresh frigid frozen frugal full funny furry fuzzy garish gaunt
    generic genuine gloomy glossy good gothic gradual grave greasy grim gross grumpy guilty hairy
    handy hard harsh hasty hazy healthy hectic helpful hidden high hoarse holy hostile huge human
    humid hungry idle ill immense inborn inner intact jagged jealous joint juicy junior just knotty
    lame lavish lawful lean legal lethal level light limp linear liquid literal local logical long
    loose lunar magnetic main major manual marine massive mature mean medical mental mere mild minor
    mobile modern moist moral mortal murky musical mutual mystic naive nasty native naval neat
    nervous neutral nimble normal novel numb obscure odd offbeat official oily old open
    optical optimal oral ordinary organic ornate outer oval overt partial passive perfect petty pink
    pious placid plump poetic polar polite poor potent precise pretty prime private prompt proper
    public puny pure quaint queasy radical random rational raw ready real recent regal remote rich
    rigid ripe robust rotten rude rural sacred sane savage scarce secret secure senior sensible
    serene severe shallow sheer short shrill shy sick single sleek sleepy slick slow sly small smart
    smooth snug sober social soft solar sole solid sour spare sparse spicy spiral square stale stark
    static steady steep sterile stern sticky stiff stout strange strict strong sturdy subtle sudden
    superb supple surly sweet swift tacit tall tame tart tasty tender tense tepid thick thin thirsty
    tidy tight timid tiny tired total tough toxic tragic tranquil tricky trivial tropical true
    typical ugly ultimate unique upper upset urban urgent useful usual vacant vague valid vast
    verbal vertical viable vibrant vicious vile viral virtual visible vital vivid vocal void warm
    wary weak wealthy weary weird wet white whole wicked wide wild wise witty wooden worldly worthy
    wrong young zealous
    """.split()
)

MORE_NOUNS: tuple[str, ...] = tuple(
    """
    abbey accent accident account acid acre actor address admiral advice affair agency agenda agent
    airport alarm album alley almond altar amount anatomy ancestor angel angle animal ankle answer
    ant antenna apartment appetite apron arena argument arm armor army aroma article artist ash
    aspect asset athlete atlas atom attic auction audience aunt author avenue award axis baby back
    bacon bag bakery balance balcony ball ballet bamboo banana band bank banner bar barber barn
    barrier base basin bat batch bath battery battle bay beach bead beak beam bean bear beard beast
    beaver bed bee beef beetle beggar belief belly belt bench bend berry bible bill bird birth
    biscuit bishop bite blade blizzard block blood bloom blouse board body bolt bomb bone bonus book
    boot border boss bottom boulder bowl box boy bracelet brain branch brand bread break breath
    breeze brick bride brother brush bubble budget buffalo bulb bull bullet bundle burden bureau
    burger bus bush butcher butter cab cabbage cable cactus cage cake calendar calf camera camp
    canal canary cancer candidate candy cannon canoe canvas cape capital captain car caravan carbon
    card career cargo carrot cart cartoon cash casino cat cattle cause cave ceiling cellar cement
    center century ceremony chain chalk champion channel chapel chapter charcoal charm chart cheek
    cheese chef chemist chest chicken child chimney chin chip chocolate choice choir chorus church
    cigar cinema citizen city clam class claw clay cliff clinic cloak clothes clover clown club clue
    coach coal coast coat cobra code coffee coffin coin collar college colony color column comb
    comedy command company concept concert contract convent cook cookie copy cord cork corn corner
    costume cotton couch council country couple courage court cousin cow coyote crab crack craft
    crane crate crater crayon creature credit creek crew cricket crime crisis critic crop cross crow
    crowd crust crystal cube cuisine culture cup cupboard cure currency cushion custom cycle
    cylinder dad dagger dairy dam damage dance danger date daughter dawn day deal debate debt decade
    deck decree deer degree delay delta demand dentist deputy desk dessert detail device devil dew
    diagram dialect diamond diary diet dinner diploma direction disaster discount disease dish ditch
    dock doctor document dog doll dollar dome door dose doubt dough dove dozen dragon drama drawer
    dream dress drill drink driver duck duke dune dust dwarf ear earth ease echo editor effect
    effort egg elbow election elephant elevator elf empire employer enemy energy entrance envelope
    envy episode error essay estate evening event exam example excuse exhibit exit expense eye
    fabric face factor factory faculty failure faith fame family fan farm farmer fashion fate father
    fault favor fear feast fee fellow fence fern ferry fever fiber fiction field fight figure film
    filter finger fire fish fist flag flame flash flavor flaw fleet flesh flight flood floor flour
    flower fluid fly fog folk food foot force fork form fort fortune fossil fox fraction frame fraud
    freedom freezer friend frog frontier fruit fuel funeral fur furnace future galaxy gallery gallon
    game gang gap garage garbage garlic gas gate gauge gear gender gene ghost gift ginger giraffe
    girl glass globe glory glove glue goal goat god gold goose gospel gossip grain grammar grandma
    grape grass gravel gravity grid grief grin grip grocery ground group growth guard guess guest
    guide guild guilt gulf gum gun guy gym habit hail hair hall ham hand handle hat hatch hawk hay
    head health heap heart heat heaven hedge heel height heir helicopter helper herb herd hero hobby
    hog hole holiday home honey honor hood hoof hook horizon horn horse hospital host hotel hour
    house humor hunger hunter hut hymn ice icon idea image impact inch income index infant ink inn
    input insect insult invoice iron item jail jam jar jaw jazz jeans jelly jet jewel job joke
    journal journey joy judge juice jungle jury justice kennel kernel key kid kidney king kingdom
    kiss kitchen kitten knee knife knight knot label labor lace lamb lamp land lane language laptop
    laser laundry law lawn lawyer layer leader leaf league leather lecture leg legend leisure lens
    lesson letter lettuce library lid lie life limb limit line linen lip list liver load loaf loan
    lobby lobster lock log logic loop lord loss lot love luck luggage lumber lunch lung machine
    magazine magnet maid mail mall mammal manager mansion map march margin market marriage mask mass
    master match mayor maze meal measure meat medal melody melon member memory menu mercy message
    metal meter method midnight mile milk mill mind mineral minister minute miracle missile mist
    mistake mixture model moment monarch money monitor monk monkey month mood moon moss moth mother
    motor mouse mouth movie mud mule muscle museum mushroom music mustard mystery myth nail name
    nation nature navy neck nephew nerve nest net network news niece night noise noon nose notebook
    notion novice nurse nut oak oar object ocean office oil onion opera opinion orbit orchestra
    order organ origin ostrich outcome oven oxygen oyster pack page pain paint pair pan panda panel
    panic paper parade parcel parent park parlor part partner party passage passport past pasta
    patch path patrol pattern pause pavement peace peach peacock peak peanut pear pearl peasant
    pedal pen penalty people perfume permit person petal phase phone photo phrase pie pig pigeon
    pile pill pilot pin pioneer pipe pirate pistol pit pitch pizza place plague plane plant plate
    platform player plaza plot plum plumber pocket poem poet poetry point poison pole police pond
    pool pope porch port portrait post pot potato pottery pound powder power praise prayer prefix
    present price priest prince prison prize problem process product profit program project proof
    proverb pudding pulse pump pumpkin punch pupil puppet puppy purpose purse quality quarrel
    quarter queen quest question queue quilt quiz race rack radar radio raft rag rail rain ram ranch
    range rank rat ratio ray razor reason rebel receipt recipe record reef region relief remedy rent
    report reptile rescue resort result reward rhyme rhythm rice riddle ridge rifle ring riot risk
    ritual rival road robe robin robot rock rod roof room rooster root rope rose route row rubber
    rug ruin rule rumor runner sack sailor saint salad salary sale salmon salt sample sand sandal
    satin sauce sausage scale scandal scar scarf scene scent school science scissors scout screen
    screw script sea seal season seat secretary seed segment self senate sense sentence sequel
    servant sewer shadow shaft shape share shark shed sheep sheet shelf shell shepherd sheriff
    shield ship shirt shock shoe shop shore shoulder shovel shower shrimp shrine side siege sign
    signal silk sin singer sink siren sister site size skate skeleton skill skin skirt skull sky
    sleeve slice slide slogan slope smell smile smoke snack snail snake snow soap soccer sock
    sofa soil soldier son song sort soul sound soup source south space spade spark speaker spear
    species speech sphere spice spider spike spine spirit spoon sport spot spouse spring spy squad
    squirrel stable stadium staff stage stain stair stamp star state statue steam steel stem step
    stick stock stomach stone stool store stork storm story stove stranger straw stream street
    string studio stuff subject suburb subway success sugar suit summer summit sun surface surgeon
    surname sword symbol symptom syrup system table tail tailor talent tank tape target task taste
    tax taxi tea teacher team tear temple tempo tenant tennis tent term terrace text theater
    theme theory thief thigh thing thorn thread throat throne thumb thunder ticket tide tiger tile
    timber time tin tip tire title toast tobacco toe toilet token tomato tomb tone tongue tool tooth
    top topic torch tortoise touch tour towel tower town toy track trade tradition traffic trail
    train tram trap travel tray treasure treaty tree trend trial tribe trick trigger trip troop
    trophy trouble trousers truck trumpet trunk trust truth tube tulip tuna tunnel turkey turnip
    turtle twig twin type tyrant umbrella uncle uniform union unit universe usage vacation valley
    value van vapor variety vase vault vehicle veil vein velvet vendor verdict verse vessel veteran
    victim victory video view villa village vinegar vineyard violet violin virtue virus vision
    visitor voice volcano volume vote vowel voyage vulture wage wagon waiter walker wall wallet
    walnut walrus war wardrobe warning warrior wasp waste watch water wave wax way weapon weather
    web wedding weed week weight welfare whale wheat wheel whip whisker whistle widow wife willow
    wind window wine wing winter wire witch witness wolf woman wood wool word worker world worm
    wound wreck wrist writer yard yarn year yeast yogurt youth zebra zero zipper zone zoo
    """.split()
)

MORE_VERBS: tuple[str, ...] = tuple(
    """
    absorb accept accuse achieve acquire adapt add adjust admire admit adopt advise afford agree
    allow amuse announce appear approve arise arrange arrest arrive ask assist assume attack attend
    attract avoid bake bathe become beg begin behave belong betray blame bless blink boil borrow
    bother bounce bow breathe bring build burn bury buy calculate call cancel carry carve celebrate
    change charge chase cheat check cheer chew choose clap clean climb cling close collect combine
    come compare complain confess confirm confuse connect conquer consider consist contain continue
    convert convince cope correct cough count cover crash crawl create creep cry cut dare deceive
    decide declare decline decorate defend define delete deliver deny depart depend deposit describe
    deserve destroy detect develop die differ dig dine disagree discover discuss dislike divide
    donate drag draw drift drip drive drop drown earn eat elect embark employ enable encourage
    endure engage enjoy enlarge ensure enter entertain erase escape evaluate examine exceed exchange
    excite exclude exist expand expect explain explode explore extend fade fail fall fasten feed
    feel fetch fill find finish fix flap flee float flow fold follow forbid forget forgive freeze
    frighten gain gather gaze generate get give glow go govern grab grant greet grind grow guarantee
    hang happen harm hate have heal hear help hesitate hide hire hit hold hop hope hug hum hurry
    hurt identify ignore imagine imitate improve include increase inform inherit injure insert
    insist inspect inspire install intend interrupt introduce invent invite irritate jog join juggle
    jump keep kick kill knit knock know laugh launch lead learn leave lend let lift listen live look
    lose maintain make manage marry matter melt memorize mend mention merge miss moan move multiply
    nod notice obey observe obtain occur offend omit oppose overcome owe own perform persuade plead
    please polish possess pour practice pray predict prefer prepare prevent print proceed produce
    promise pronounce protect prove provide publish pull punish push put quit quote raise reach
    react read realize recall receive recommend reduce refer refuse regret reject relax release rely
    remain remember remind remove repair repeat replace reply represent require resemble resign
    resist respond restore retire return reveal rinse rise roam rob roll rub run rush satisfy save
    say scatter scold scrape scratch scream search see seem seize select sell send separate serve
    settle shake shave shine shiver shoot shout show shrink shrug shut sigh sing sit sleep slip
    sneeze sniff snore soak solve speak spell spend spill spin split spoil spread squeeze stand
    stare start stay steal sting stir stop stretch strike strive struggle study stumble submit
    succeed suffer suggest supply support suppose surprise surrender survive suspect swallow swear
    sweep swell swim swing switch take talk teach tease tell tempt thank think throw tickle tie
    translate tremble try tug turn twist understand unite unlock unpack urge use vanish vary visit
    wait wake walk wander want warn wash weave weep weigh welcome whisper win wink wipe wish wonder
    work worry wrap wrestle write yawn yell yield zoom
    """.split()
)

NAMES: tuple[str, ...] = tuple(
    """
    Adele Alma Anton Beatrice Boris Carlos Clara Daniel Dora Edgar Elena Felix Fiona George
    Greta Hanna Hugo Ida Igor Jasper Julia Karl Laura Leo Lydia Marcus Maria Nadia Nils Olga Oscar
    Paula Peter Rosa Samuel Sofia Theo Ursula Viktor Wanda
    """.split()
)


def words_of(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns adjectives and nouns of a split; the splits share no word."""
    half = slice(0, None, 2) if split == "train" else slice(1, None, 2)
    return ADJECTIVES[half], NOUNS[half]


def key_names(split: Split) -> tuple[str, ...]:
    """Returns every compound key of a split, such as "amber-lantern", in a fixed order.

    The splits share neither adjectives nor nouns, so that keys of one split are unknown to a model trained
    on the other.
    """
    adjectives, nouns = words_of(split)
    return tuple(f"{adjective}-{noun}" for adjective, noun in product(adjectives, nouns))
